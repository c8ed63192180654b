"""LoRA adapters of the embedded engine: versions side by side, each right, published alone, and nothing else touched."""

from __future__ import annotations

import copy
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from engine_reference import greedy_on
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from torch import nn

from weightcast import Publisher
from weightcast.deadline import Deadline
from weightcast.engines.base import RequestOutput
from weightcast.engines.embedded import LLM, SamplingParams
from weightcast.errors import (
    EngineError,
    InvalidInput,
    LoadError,
    PlanMismatch,
    RoundFailed,
    ShadowError,
    StateError,
    UnknownModel,
    Unsupported,
    WeightcastError,
)
from weightcast.manifest.adapters import CONFIG_NAME
from weightcast.receiver.adapter_model import read_config
from weightcast.trainer.clients.in_process import InProcessEngineClient

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
NUM_TOKENS = 10
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
Build = Callable[..., Any]
Start = Callable[..., LLM]


def adapted(model: Any, name: str = "policy", **options: Any) -> Any:
    config = LoraConfig(**{"r": 4, "lora_alpha": 9, "target_modules": "all-linear", **options})
    return get_peft_model(copy.deepcopy(model), config, adapter_name=name)


@torch.no_grad()
def scatter(model: nn.Module, name: str = "policy") -> None:
    """Fresh random values for an adapter, in place."""
    for path, value in model.named_parameters():
        if f".{name}." in path:
            value.copy_(torch.randn(value.shape) * 0.3)


def saved(model: Any) -> dict[str, torch.Tensor]:
    """What PEFT writes into a checkpoint of the adapter."""
    return get_peft_model_state_dict(model, adapter_name="policy", save_embedding_layers=False)


def merged(model: Any) -> Any:
    return copy.deepcopy(model).merge_and_unload().eval()


def prompt(count: int = 7) -> list[int]:
    return torch.randint(3, 300, (count,)).tolist()


def tokens_of(llm: LLM, ids: list[int], adapter: str | None = None) -> list[int]:
    return llm.generate(ids, GREEDY, adapter=adapter)[0].outputs[0].token_ids


class Running:
    """A request that stops the engine once it has some tokens, so that what comes then comes while it runs."""

    def __init__(self, llm: LLM, ids: list[int], adapter: str | None, num_tokens: int = 3) -> None:
        self._llm, self._outputs = llm, queue.SimpleQueue[RequestOutput]()
        self._stands, self._stop_at = queue.SimpleQueue[int](), num_tokens
        self.request = llm.engine.request(ids, GREEDY, self._hear, stream=True, adapter=adapter)
        llm.engine.submit([self.request]).result(10)
        assert self._stands.get(timeout=10) == num_tokens

    def _hear(self, output: RequestOutput) -> None:
        if len(output.outputs[0].token_ids) == self._stop_at:
            self._llm.engine.core.pause("keep", False)  # on the engine's thread
            self._stands.put(self._stop_at)
        self._outputs.put(output)

    def finished(self) -> RequestOutput:
        """Its last output, once the engine goes on."""
        while not (output := self._outputs.get(timeout=20)).finished:
            continue
        return output


@contextmanager
def parts_of_steps(llm: LLM) -> Iterator[list[set[str]]]:
    """The versions that each step computes."""
    adapters, seen = llm.engine.core.adapters, list[set[str]]()
    computing = adapters.computing

    def noted(parts: Any) -> Any:
        seen.append({part.version.label for part in parts})
        return computing(parts)

    adapters.computing = noted  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        adapters.computing = computing  # type: ignore[method-assign]


def live_tensors(llm: LLM, name: str = "policy") -> dict[str, torch.Tensor]:
    """What lies in the memory that the current version computes with, found without the manifest or a digest."""
    version = llm.engine.core.adapters.find(name)
    return {
        f"base_model.model.{module}.lora_{factor}.weight": value.clone()
        for module, (a, b, _) in version.modules.items()
        for factor, value in (("A", a), ("B", b))
    }


@pytest.mark.parametrize(
    ("arch", "dtype", "options"),
    [
        ("qwen3", "float64", {}),
        ("llama", "float64", {"target_modules": ["q_proj", "lm_head", "down_proj"], "rank_pattern": {"q_proj": 64}}),
        ("qwen3_tied", "float32", {"use_rslora": True, "alpha_pattern": {"k_proj": 3}}),
        ("gemma3", "float64", {"target_modules": ["q_proj", "v_proj", "gate_proj"]}),
        ("deepseek_v3", "float64", {"target_modules": ["q_b_proj", "kv_b_proj", "o_proj"]}),
    ],
)
def test_two_versions_and_none_in_one_batch(build: Build, start: Start, arch: str, dtype: str, options: Any) -> None:
    folder, reference = build(arch, dtype)
    trainer, llm = adapted(reference, **options), start(folder, dtype=dtype)
    with Publisher(trainer, [llm], adapter="policy", timeout_s=20) as publisher:
        scatter(trainer)
        publisher.publish()
        for _ in range(2):
            before, ids = merged(trainer), [prompt(n) for n in (5, 9, 3, 1)]
            first = Running(llm, ids[0], "policy")
            scatter(trainer)
            report = publisher.publish()
            assert report.digests_match
            assert llm.is_paused(), "the pause is the test's, and an adapter's commit leaves it as it is"
            after = merged(trainer)
            with ThreadPoolExecutor(3) as pool, parts_of_steps(llm) as steps:
                others = [
                    pool.submit(tokens_of, llm, ids[n], name) for n, name in ((1, "policy"), (2, None), (3, "policy"))
                ]
                while llm.status().num_waiting < len(others):
                    continue
                llm.resume_generation()
                done = first.finished()
                found = [done.outputs[0].token_ids, *(each.result(20) for each in others)]
            truth = [
                greedy_on(model, each, NUM_TOKENS)
                for model, each in zip((before, after, reference, after), ids, strict=True)
            ]
            assert found == truth
            assert truth[0] != greedy_on(after, ids[0], NUM_TOKENS), "else the test could not tell versions apart"
            assert max(map(len, steps)) == 2, "both versions were in one step"
            assert done.adapter == f"policy@{report.number - 1}-{done.adapter.partition('-')[2]}"
            assert llm.status().num_preemptions == 0
            assert live_tensors(llm).keys() == saved(trainer).keys()
            for name, value in saved(trainer).items():
                assert torch.equal(live_tensors(llm)[name], value), name


@pytest.mark.parametrize("settings", [{}, {"transport": "tcp"}, {"transport": "tcp", "delta": True}])
def test_rounds_while_requests_stay(build: Build, start: Start, settings: Any) -> None:
    """Each round lands in memory that no request reads, also where it brings only what changed since the round before."""
    folder, reference = build()
    trainer, llm = adapted(reference), start(folder)
    running, truth = [], []
    with Publisher(trainer, [llm], adapter="policy", timeout_s=20, **settings) as publisher:
        scatter(trainer)
        publisher.publish()
        for _ in range(4):
            ids = prompt()
            truth.append(greedy_on(merged(trainer), ids, NUM_TOKENS))
            llm.resume_generation()
            running.append(Running(llm, ids, "policy", num_tokens=2))
            with torch.no_grad():
                trainer.base_model.model.model.layers[1].self_attn.o_proj.lora_B["policy"].weight.normal_()
            publisher.publish()
            assert all(torch.equal(live_tensors(llm)[name], value) for name, value in saved(trainer).items())
    llm.resume_generation()
    assert [each.finished().outputs[0].token_ids for each in running] == truth


def test_linear_layers_that_are_kept_the_other_way_round(start: Start) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=1))
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn(value.shape) * 0.2)
    trainer, ids = adapted(model.double(), fan_in_fan_out=True, target_modules=["c_attn", "c_fc", "c_proj"]), prompt()
    llm = start(model, dtype="float64")
    with Publisher(trainer, [llm], adapter="policy", timeout_s=20, hold="round") as publisher:
        for waits in (True, False, True):
            scatter(trainer)
            report = publisher.publish() if waits else publisher.publish(wait=False)
            truth = greedy_on(merged(trainer), ids, NUM_TOKENS)
            if not waits:
                scatter(trainer)  # the round has a snapshot
                report.wait()
            assert tokens_of(llm, ids, "policy") == truth


def test_what_is_not_a_number_stays_in_its_version(build: Build, start: Start) -> None:
    folder, reference = build()
    trainer, llm = adapted(reference), start(folder)
    with Publisher(trainer, [llm], adapter="policy", timeout_s=20) as publisher:
        scatter(trainer)
        publisher.publish()
        ids, truth = prompt(), merged(trainer)
        running = Running(llm, ids, "policy")
        with torch.no_grad():
            trainer.base_model.model.model.layers[0].mlp.up_proj.lora_B["policy"].weight.fill_(float("nan"))
        publisher.publish()
        with ThreadPoolExecutor(1) as pool:
            broken = pool.submit(tokens_of, llm, prompt(), "policy")
            while not llm.status().num_waiting:
                continue
            llm.resume_generation()
            with pytest.raises(EngineError, match="not finite"):
                broken.result(20)
        assert running.finished().outputs[0].token_ids == greedy_on(truth, ids, NUM_TOKENS)


def test_scores_and_several_answers(build: Build, start: Start) -> None:
    """Logits that are wanted of prompts, too, come from an adapter of the head; answers of one request share its prompt."""
    folder, reference = build("llama")
    trainer = adapted(reference, target_modules=["lm_head", "o_proj"])
    llm = start(folder)
    with Publisher(trainer, [llm], adapter="policy", timeout_s=20) as publisher:
        scatter(trainer)
        publisher.publish()
    ids = prompt(6)
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True, n=2, prompt_logprobs=0)
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(tokens_of, llm, prompt(), None)
        output = llm.generate(ids, params, adapter="policy")[0]
        beside.result(20)
    truth = merged(trainer)
    with torch.no_grad():
        scores = torch.log_softmax(truth(torch.tensor([ids])).logits[0], -1)
    assert output.prompt_logprobs is not None
    for at, known in enumerate(output.prompt_logprobs[1:]):
        assert known is not None
        assert known[ids[at + 1]].logprob == pytest.approx(float(scores[at, ids[at + 1]]), abs=1e-5)
    assert [each.token_ids for each in output.outputs] == [greedy_on(truth, ids, 4)] * 2


def test_failed_rounds_leave_the_version(build: Build, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, reference = build()
    trainer, llms, ids = adapted(reference), [start(folder) for _ in range(2)], prompt()
    with Publisher(trainer, llms, adapter="policy", timeout_s=20) as publisher:
        scatter(trainer)
        version = publisher.publish().version
        truth, held = greedy_on(merged(trainer), ids, NUM_TOKENS), live_tensors(llms[0])

        def refuse(*_: Any) -> None:
            raise LoadError("nothing can be made of these")

        def late(name: str, info: Any) -> None:
            if info["action"] == "commit":
                raise EngineError("the order was lost")
            LLM.update_adapter(llms[1], name, info)

        for broken in ("make", "commit"):
            scatter(trainer)
            with monkeypatch.context() as patch:
                if broken == "make":
                    patch.setattr(llms[1].engine.core.adapters.by_name["policy"], "make", refuse)
                else:
                    patch.setattr(llms[1], "update_adapter", late)
                with pytest.raises(RoundFailed, match=r"nothing can be made|order was lost"):
                    publisher.publish()
            for llm in llms:
                served = llm.status().adapters["policy"]
                assert (served.weight_version, served.dirty) == (version, False)
                assert tokens_of(llm, ids, "policy") == truth
                assert llm.generate(ids, GREEDY, adapter="policy")[0].adapter == f"policy@{version}"
            assert all(torch.equal(value, held[name]) for name, value in live_tensors(llms[0]).items())
        publisher.publish()
        assert [tokens_of(llm, ids, "policy") for llm in llms] == [greedy_on(merged(trainer), ids, NUM_TOKENS)] * 2


def test_slots_are_counted_before_a_byte_lands(build: Build, start: Start) -> None:
    folder, reference = build()
    trainer, llm, ids = adapted(reference), start(folder, max_adapters=2), prompt()
    with Publisher(trainer, [llm], adapter="policy", timeout_s=20) as publisher:
        scatter(trainer)
        publisher.publish()
        oldest, held = merged(trainer), live_tensors(llm)
        running = Running(llm, ids, "policy")
        scatter(trainer)
        version = publisher.publish().version
        label = running.request.adapter_version.label
        scatter(trainer)
        with pytest.raises(RoundFailed, match=r"2 of 2 are taken.*max_adapters=3"):
            publisher.publish()
        assert llm.status().adapters["policy"].weight_version == version
        assert llm.status().adapters["policy"].versions == {f"policy@{version}": 0, label: 1}
        old = running.request.adapter_version.modules
        assert all(
            torch.equal(old[name.split(".", 2)[2].rsplit(".", 2)[0]][name.split(".")[-2] == "lora_B"], value)
            for name, value in held.items()
        )
        llm.resume_generation()
        assert running.finished().outputs[0].token_ids == greedy_on(oldest, ids, NUM_TOKENS)
        with pytest.raises(UnknownModel, match="retired"):
            llm.generate(ids, GREEDY, adapter=label)
        publisher.publish()
        assert tokens_of(llm, ids, "policy") == greedy_on(merged(trainer), ids, NUM_TOKENS)
        with (
            Publisher(trainer, [llm], adapter="other", timeout_s=5) as second,
            pytest.raises(StateError, match="max_adapters=4"),
        ):
            second.connect()
    big = start(folder, max_adapters=4)  # as the hint said
    with Publisher(trainer, [big], adapter="policy") as first, Publisher(trainer, [big], adapter="other") as second:
        first.publish()
        second.publish()
        assert big.adapter_names == ["policy", "other"]


def test_the_model_and_its_adapter_have_a_trainer_each(build: Build, start: Start) -> None:
    """A round of the model keeps adapters, and those in flight go on with theirs on the new weights."""
    folder, reference = build()
    trainer, whole, llm, ids = adapted(reference), copy.deepcopy(reference), start(folder), prompt()
    with (
        Publisher(trainer, [llm], adapter="policy", timeout_s=20) as alone,
        Publisher(whole, [llm], timeout_s=20) as model,
    ):
        scatter(trainer)
        adapter_version = alone.publish().version
        with torch.no_grad():
            for value in whole.parameters():
                value.add_(torch.randn(value.shape) * value.std() * 0.3)
        running = Running(llm, ids, "policy")
        already = list(running.request.sequences[0].tokens)
        model_version = model.publish().version
        scatter(trainer)
        newer = alone.publish().version
        llm.resume_generation()
        output = running.finished()
        status = llm.status()
        assert (status.weight_version, status.adapters["policy"].weight_version) == (model_version, newer)
    assert output.adapter == f"policy@{adapter_version}"
    assert [span.version for span in output.outputs[0].weight_versions] == ["default", model_version]
    assert output.outputs[0].token_ids[: len(already) - len(ids)] == already[len(ids) :]
    with torch.no_grad():
        inner = {
            n.replace("base_model.model.", "").replace(".base_layer", ""): v
            for n, v in trainer.named_parameters()
            if "lora_" not in n
        }
        for name, value in whole.named_parameters():
            inner[name].copy_(value)
    assert tokens_of(llm, ids, "policy") == greedy_on(merged(trainer), ids, NUM_TOKENS)
    assert tokens_of(llm, ids) == greedy_on(whole, ids, NUM_TOKENS)


def test_a_joiner_gets_what_the_fleet_serves(build: Build, start: Start) -> None:
    folder, reference = build()
    trainer, ids = adapted(reference), prompt()
    first, second = start(folder), start(folder)
    with Publisher(trainer, [first], adapter="policy", timeout_s=20) as publisher:
        scatter(trainer)
        version = publisher.publish().version
        assert publisher.add(second) is not None
        assert second.status().adapters["policy"].weight_version == version
        assert tokens_of(second, ids, "policy") == greedy_on(merged(trainer), ids, NUM_TOKENS)
    # The trainer is gone, and another one goes on with the numbers.
    with Publisher(trainer, [first, second], adapter="policy", timeout_s=20) as publisher:
        scatter(trainer)
        assert publisher.publish().number == 2
        assert [tokens_of(llm, ids, "policy") for llm in (first, second)] == [
            greedy_on(merged(trainer), ids, NUM_TOKENS)
        ] * 2


def test_config_form_and_name(build: Build, start: Start) -> None:
    """Another scaling is another version, another rank another form, and adapters of a model are told apart by name."""
    folder, reference = build()
    trainer, llm, ids = adapted(reference), start(folder), prompt()
    trainer.add_adapter("critic", LoraConfig(r=2, lora_alpha=5, target_modules=["v_proj"]))
    with Publisher(trainer, [llm], adapter="policy") as policy, Publisher(trainer, [llm], adapter="critic") as critic:
        scatter(trainer), scatter(trainer, "critic")
        first = policy.publish().version
        critic.publish()
        for name in ("policy", "critic"):
            trainer.set_adapter(name)
            assert tokens_of(llm, ids, name) == greedy_on(merged(trainer), ids, NUM_TOKENS)
        trainer.set_adapter("policy")
        for part in trainer.modules():
            if hasattr(part, "set_scale"):
                part.set_scale("policy", 0.4)
        assert policy.publish().version.partition("-")[2] != first.partition("-")[2], (
            "the same matrices, scaled otherwise"
        )
        assert tokens_of(llm, ids, "policy") == greedy_on(merged(trainer), ids, NUM_TOKENS)
        assert read_config(bytes(policy._source._published.config)).scaling == pytest.approx(0.4 * 9 / 4)  # type: ignore[attr-defined]
        assert CONFIG_NAME in policy._source.manifest
    larger = adapted(reference, r=16)
    scatter(larger)
    with Publisher(larger, [llm], adapter="policy") as policy:
        running = Running(llm, ids, "policy")
        policy.publish()
        llm.resume_generation()
        assert running.finished().outputs[0].token_ids == greedy_on(merged(trainer), ids, NUM_TOKENS)
        assert tokens_of(llm, ids, "policy") == greedy_on(merged(larger), ids, NUM_TOKENS)
    llm.remove_adapter("policy")
    assert llm.adapter_names == ["critic"]
    with pytest.raises(UnknownModel, match="Served adapters: critic"):
        llm.generate(ids, GREEDY, adapter="policy")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, "modules_to_save"),
        ({"target_modules": ["embed_tokens"]}, "embedding"),
        ({"bias": "lora_only"}, "biases"),
        ({"trainable_token_indices": [1, 2], "target_modules": ["q_proj"]}, "trainable_token_indices"),
    ],
)
def test_what_is_no_adapter_for_engines_is_refused(build: Build, start: Start, options: Any, named: str) -> None:
    folder, reference = build("llama")
    trainer, llm = adapted(reference, **options), start(folder)
    with pytest.raises(Unsupported, match=named) as refusal:
        Publisher(trainer, [llm], adapter="policy")
    assert "without adapter=" in str(refusal.value)
    scatter(trainer)
    ids = prompt()
    with Publisher(trainer, [llm], timeout_s=20) as publisher:  # as the hint says
        publisher.publish()
    assert tokens_of(llm, ids) == greedy_on(merged(trainer), ids, NUM_TOKENS)


@pytest.mark.parametrize("how", ["pissa_niter_2", "olora", "a trained norm"])
def test_an_adapter_for_other_base_weights_is_refused(build: Build, start: Start, how: str) -> None:
    folder, reference = build("llama", "float32")
    is_norm = how.endswith("norm")
    trainer, llm = adapted(reference, **({} if is_norm else {"init_lora_weights": how})), start(folder, dtype="float32")
    norm = trainer.base_model.model.model.norm.weight.requires_grad_(is_norm)
    with pytest.raises(Unsupported, match="model.norm.weight" if is_norm else how) as refusal:
        Publisher(trainer, [llm], adapter="policy")
    assert "without adapter=" in str(refusal.value)
    with torch.no_grad():
        norm.add_(torch.rand(norm.shape))
    ids = prompt()
    with Publisher(trainer, [llm], timeout_s=20) as publisher:  # as the hint says
        publisher.publish()
    assert tokens_of(llm, ids) == greedy_on(merged(trainer), ids, NUM_TOKENS)
    if is_norm:
        norm.requires_grad_(False)  # as the hint says, too; the engine's base is the trainer's by now
        other = LoraConfig(r=2, use_dora=True, target_modules=["v_proj"], modules_to_save=["embed_tokens"])
        trainer.add_adapter("critic", other)
        trainer.set_adapter("critic")  # what another adapter trains is none of the base model
        with Publisher(trainer, [llm], adapter="policy", timeout_s=20) as publisher:
            publisher.publish()


@pytest.mark.parametrize("hold", ["always", "round"])
def test_layers_that_come_and_go(build: Build, start: Start, hold: str) -> None:
    """An adapter that is in other layers than at connect() is no round; connect() takes it up as it is."""
    folder, reference = build()
    options = {"r": 4, "lora_alpha": 9}
    trainer, llm, ids = adapted(reference, target_modules=["q_proj"], **options), start(folder), prompt()
    trainer.add_adapter("critic", LoraConfig(r=2, target_modules=["v_proj"]))

    def inject() -> None:
        inject_adapter_in_model(LoraConfig(target_modules=["up_proj"], **options), trainer.base_model.model, "policy")

    def fewer() -> None:
        trainer.delete_adapter("policy")
        trainer.add_adapter("policy", LoraConfig(target_modules=["q_proj"], **options))
        trainer.set_adapter("policy")

    with Publisher(trainer, [llm], adapter="policy", timeout_s=20, hold=hold) as publisher:
        scatter(trainer)
        publisher.publish()
        for change in (inject, fewer):
            change()
            scatter(trainer)
            if hold == "always":
                served = live_tensors(llm)
                with pytest.raises(
                    StateError, match=r"adapter 'policy' (came to|is gone from) '.*\.up_proj'.*connect\(\)"
                ):
                    publisher.publish()
                assert all(torch.equal(value, served[name]) for name, value in live_tensors(llm).items())
            publisher.connect()
            publisher.publish()
            assert live_tensors(llm).keys() == saved(trainer).keys()
            assert tokens_of(llm, ids, "policy") == greedy_on(merged(trainer), ids, NUM_TOKENS)
        trainer.to("meta")
    with pytest.raises(Unsupported, match="meta device"):
        Publisher(trainer, [llm], adapter="policy")


@pytest.mark.parametrize("hold", ["always", "round"])
def test_no_other_adapter_goes_out_under_a_name(build: Build, start: Start, hold: str) -> None:
    folder, reference = build()
    trainer, llm = adapted(reference), start(folder)
    trainer.add_adapter("critic", LoraConfig(r=4, lora_alpha=9, target_modules="all-linear"))
    with Publisher(trainer, [llm], adapter="policy", timeout_s=20, hold=hold) as publisher:
        scatter(trainer), scatter(trainer, "critic")
        publisher.publish()
        served = live_tensors(llm)
        trainer.delete_adapter("policy")
        for call in (publisher.publish, publisher.connect, publisher.publish):
            with pytest.raises((StateError, InvalidInput), match="adapter 'policy'"):
                call()
        assert all(torch.equal(value, served[name]) for name, value in live_tensors(llm).items())
        trainer.add_adapter("policy", LoraConfig(r=4, lora_alpha=9, target_modules="all-linear"))  # as the hint says
        scatter(trainer)
        publisher.connect()
        publisher.publish()
        assert all(torch.equal(live_tensors(llm)[name], value) for name, value in saved(trainer).items())
    trainer.delete_adapter("policy"), trainer.delete_adapter("critic")
    with pytest.raises(InvalidInput, match=r"the model has no adapter\b.*add_adapter"):
        Publisher(trainer, [llm], adapter="policy")


def test_a_join_that_fails_keeps_no_slot(build: Build, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, reference = build()
    trainer, llm = adapted(reference), start(folder, max_adapters=2)

    def full(*_: Any) -> None:
        raise ShadowError("no memory for the staged copy")

    with Publisher(trainer, [llm], adapter="first", timeout_s=10) as publisher, monkeypatch.context() as patch:
        patch.setattr("weightcast.receiver.session.make_target", full)
        with pytest.raises(ShadowError):
            publisher.connect()
    assert llm.status().adapters == {}
    with Publisher(trainer, [llm], adapter="second", timeout_s=10) as publisher:
        publisher.publish()
    with Publisher(trainer, [llm], adapter="third", timeout_s=10) as publisher:
        with pytest.raises(StateError, match="max_adapters"):
            publisher.connect()
        llm.shutdown_weight_transfer_engine()  # leaves the trainer of the model; adapters stay
        assert llm.adapter_names == ["second"]
        llm.remove_adapter("second")
        publisher.publish()
    assert llm.adapter_names == ["third"]


def test_a_removed_version_keeps_its_memory(build: Build, start: Start) -> None:
    """A trainer that comes after the removal writes elsewhere than where requests still read."""
    folder, reference = build()
    trainer, llm, ids = adapted(reference), start(folder), prompt()
    scatter(trainer)
    with Publisher(trainer, [llm], adapter="policy", timeout_s=20) as publisher:
        publisher.publish()
        truth, running = greedy_on(merged(trainer), ids, NUM_TOKENS), Running(llm, ids, "policy")
    modules = running.request.adapter_version.modules
    held = {module: (a.clone(), b.clone()) for module, (a, b, _) in modules.items()}
    llm.remove_adapter("policy")
    with Publisher(trainer, [llm], adapter="policy", timeout_s=20) as publisher:
        for _ in range(3):
            scatter(trainer)
            publisher.publish()
            assert all(torch.equal(a, held[m][0]) and torch.equal(b, held[m][1]) for m, (a, b, _) in modules.items())
    llm.resume_generation()
    assert running.finished().outputs[0].token_ids == truth
    assert tokens_of(llm, ids, "policy") == greedy_on(merged(trainer), ids, NUM_TOKENS)


def test_refusals(build: Build, start: Start) -> None:
    folder, reference = build()
    trainer, llm = adapted(reference), start(folder, max_lora_rank=3)
    refused: list[tuple[type[WeightcastError], str, Any, dict[str, Any]]] = [
        (InvalidInput, "get_peft_model", reference, {"adapter": "policy"}),
        (InvalidInput, "without @", trainer, {"adapter": "policy@3"}),
        (InvalidInput, "mode is", trainer, {"adapter": "policy", "mode": "in_place"}),
    ]
    refused.append((Unsupported, "lora_bias=False", adapted(reference, lora_bias=True), {"adapter": "policy"}))
    for kind, text, source, settings in refused:
        with pytest.raises(kind, match=text):
            Publisher(source, [llm], **settings)
    with Publisher(trainer, [llm], adapter="policy") as publisher, pytest.raises(Unsupported, match="max_lora_rank=4"):
        publisher.connect()
    other = adapted(build("qwen3", hidden_size=128)[1], r=2)
    with Publisher(other, [llm], adapter="policy") as publisher, pytest.raises(PlanMismatch, match="matrices are"):
        publisher.connect()
    with pytest.raises(UnknownModel, match="no adapter 'policy'"):
        llm.generate(prompt(), GREEDY, adapter="policy")
    assert llm.status().adapters == {}
    client = InProcessEngineClient(llm)
    client.for_adapter("policy")
    with pytest.raises(EngineError, match="the engine has no adapter 'policy'"):  # removed while its trainer is there
        client.status(Deadline(10))
    client.close()
