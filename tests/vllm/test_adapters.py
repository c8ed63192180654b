"""LoRA adapters of a trainer on stock vLLM: versions side by side in one batch, each with the tokens of merged weights, and nothing pauses."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.vllm import offline
from tests.vllm.adapters import (
    LENGTH,
    LORA,
    PROMPTS,
    Stepped,
    assert_live,
    base_tokens,
    greedy,
    params,
    rebase,
    scatter,
    tokens_of,
    trainer_of,
    worker_of,
)
from tests.vllm.weights import fill, replace

from weightcast import Publisher
from weightcast.engines.embedded import LLM
from weightcast.errors import PlanMismatch, RoundFailed, UnknownModel, Unsupported
from weightcast.testing.models import build_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("adapters") / "m", "qwen3", dtype="float32", head_dim=32)


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[Any]:
    with offline.engine(model, **LORA) as engine:
        yield engine


def test_two_versions_and_none_in_one_batch(llm: Any, model: Path) -> None:
    trainer = trainer_of(model)
    with Publisher(trainer, [llm], adapter="policy", timeout_s=60) as publisher:
        publisher.publish()
        for number in range(3):
            running = Stepped(llm)
            before = greedy(trainer, PROMPTS[0])
            running.add(f"{number}-old", PROMPTS[0], "policy")
            running.step(5)
            scatter(trainer)
            report = publisher.publish()
            assert report.digests_match
            for name, ids, adapter in (("new", PROMPTS[1], "policy"), ("none", PROMPTS[2], None)):
                running.add(f"{number}-{name}", ids, adapter)
            running.step(3)
            assert running.num_tokens[f"{number}-new"] > 0
            assert running.num_tokens[f"{number}-old"] > 5, "side by side"
            running.finish()
            assert running.tokens(f"{number}-old") == before
            assert before != greedy(trainer, PROMPTS[0]), "else the test could not tell versions apart"
            assert running.tokens(f"{number}-new") == greedy(trainer, PROMPTS[1])
            assert running.tokens(f"{number}-none") == base_tokens(trainer, PROMPTS[2])
            assert running.label(f"{number}-new") == f"policy@{report.version}"
            assert running.label(f"{number}-old") != running.label(f"{number}-new")
            assert_live(llm, trainer, running.done[f"{number}-new"].lora_request.lora_int_id)


@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_rounds_of_the_model_keep_adapters(llm: Any, model: Path, mode: str) -> None:
    trainer, weights = trainer_of(model), load_file(model / "model.safetensors")
    initial = {name: value.clone() for name, value in weights.items()}
    with (
        Publisher(trainer, [llm], adapter="policy", timeout_s=60) as adapters,
        Publisher(weights, [llm], mode=mode, timeout_s=60) as whole,
    ):
        version = adapters.publish().version
        for _ in range(2):
            replace(weights, model)
            rebase(trainer, weights)
            report = whole.publish()
            assert report.digests_match
            assert llm.get_weight_version() == report.version
            running = Stepped(llm)
            running.add("own", PROMPTS[0], f"policy@{version}")
            running.add("base", PROMPTS[1], None)
            running.finish()
            assert running.tokens("own") == greedy(trainer, PROMPTS[0])
            assert running.tokens("base") == base_tokens(trainer, PROMPTS[1])
            worker_of(llm).model_runner.reset_lora_state()  # what vLLM's own finish of an update calls
            assert tokens_of(llm, PROMPTS[2]) == greedy(trainer, PROMPTS[2])
            scatter(trainer)
            version = adapters.publish().version
            assert tokens_of(llm, PROMPTS[2]) == greedy(trainer, PROMPTS[2])
        fill(weights, initial)
        whole.publish()  # what other tests start from


def test_keys_and_values_are_those_of_a_version(llm: Any, model: Path) -> None:
    """A prompt that vLLM has in its prefix cache for one version is computed anew for the next one."""
    trainer, ids = trainer_of(model), [int(token) for token in torch.randint(5, 300, (220,))]
    with Publisher(trainer, [llm], adapter="policy", timeout_s=60) as publisher:
        for number in range(3):
            scatter(trainer)
            publisher.publish()
            running, truth = Stepped(llm), greedy(trainer, ids)
            for again in range(2):
                running.add(f"{number}-{again}", ids, "policy")
                running.finish()
                assert running.tokens(f"{number}-{again}") == truth
                assert (running.done[f"{number}-{again}"].num_cached_tokens > 0) == (again > 0)


def test_slots_are_counted_before_anything_is_registered(llm: Any, model: Path) -> None:
    trainer, running = trainer_of(model), Stepped(llm)
    models = worker_of(llm).model_runner.lora_manager._adapter_manager
    truth = {}
    with Publisher(trainer, [llm], adapter="policy", timeout_s=60) as publisher:
        for name in ("first", "second", "third"):
            scatter(trainer)
            version = publisher.publish().version
            truth[name] = greedy(trainer, PROMPTS[0])
            running.add(name, PROMPTS[0], "policy")
            running.step(2)
        before = sorted(models.list_adapters())
        scatter(trainer)
        with pytest.raises(RoundFailed, match="--max-loras 4") as failed:
            publisher.publish()
        assert "requests still run on policy@" in str(failed.value)
        assert sorted(models.list_adapters()) == before
        assert tokens_of_running(running, "fourth") == truth["third"]
        assert running.label("fourth") == f"policy@{version}"
        running.finish()
        assert {name: running.tokens(name) for name in truth} == truth
        publisher.publish()
        assert tokens_of(llm, PROMPTS[1]) == greedy(trainer, PROMPTS[1])
        retired = running.label("first")
        with pytest.raises(UnknownModel, match="retired"):
            tokens_of(llm, PROMPTS[1], retired)
        core = llm.llm_engine.engine_core.engine_core
        with pytest.raises(UnknownModel, match="not there any more"):
            core.add_request(SimpleNamespace(lora_request=running.done["first"].lora_request))
        assert not llm.llm_engine.has_unfinished_requests()
        assert tokens_of(llm, PROMPTS[1]) == greedy(trainer, PROMPTS[1])


def tokens_of_running(running: Stepped, name: str) -> list[int]:
    """A request beside those that run already."""
    running.add(name, PROMPTS[0], "policy")
    running.finish()
    return running.tokens(name)


def test_one_engine_that_fails_takes_the_round_back_on_the_other(
    llm: Any, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round that vLLM has no part in the failure of, one that it fails in before anything was changed, and one half-way."""
    other, trainer = LLM(model, dtype="float32"), trainer_of(model)

    def answers() -> tuple[list[int], list[int]]:
        (answer,) = other.generate(PROMPTS[0], weightcast_params(), adapter="policy")
        assert answer.adapter == f"policy@{version}"
        return tokens_of(llm, PROMPTS[0], f"policy@{version}"), answer.outputs[0].token_ids

    with Publisher(trainer, [llm, other], adapter="policy", timeout_s=60) as publisher:
        version, truth = publisher.publish().version, greedy(trainer, PROMPTS[0])
        adapter = worker_of(llm).weight_transfer_engine._adapters.workers["policy"].engine.model
        for place, name in ((other, "update_adapter"), (adapter._adapters.manager, "add"), (adapter, "rebind")):
            with monkeypatch.context() as patched:
                patched.setattr(place, name, failing_once(getattr(place, name)))
                scatter(trainer)
                with pytest.raises(RoundFailed, match="no room in the step"):
                    publisher.publish()
            assert answers() == (truth, truth)
            if name == "rebind":  # nobody can tell any more what the name would stand for
                with pytest.raises(UnknownModel, match="is served"):
                    tokens_of(llm, PROMPTS[0])
            else:
                assert tokens_of(llm, PROMPTS[0]) == truth
            version, truth = publisher.publish().version, greedy(trainer, PROMPTS[0])
            assert answers() == (truth, truth)
            assert tokens_of(llm, PROMPTS[0]) == truth
    other.shutdown()


def failing_once(function: Callable[..., Any]) -> Callable[..., Any]:
    failures = iter([RuntimeError("no room in the step")])

    def instead(*arguments: Any) -> Any:
        for failure in failures:
            raise failure
        return function(*arguments)

    return instead


def weightcast_params() -> Any:
    from weightcast.engines.base import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True)


def test_what_vllm_cannot_compute_is_refused_when_the_trainer_joins(llm: Any, model: Path) -> None:
    def refusal(trainer: Any, kind: type[Exception], text: str) -> None:
        with Publisher(trainer, [llm], adapter="other", timeout_s=60) as publisher, pytest.raises(kind, match=text):
            publisher.connect()

    refusal(trainer_of(model, "other", r=32), Unsupported, "--max-lora-rank 32")
    refusal(trainer_of(model, "other", target_modules=["lm_head", "q_proj"]), Unsupported, "lm_head")
    wider = build_tiny_model(model.parent / "wider", "qwen3", dtype="float32", head_dim=32, intermediate_size=112)
    refusal(trainer_of(wider, "other"), PlanMismatch, "inputs and outputs")


def test_scalings_of_modules_and_ranks(llm: Any, model: Path) -> None:
    trainer = trainer_of(
        model, use_rslora=True, rank_pattern={"q_proj": 16, "down_proj": 3}, alpha_pattern={"k_proj": 3, "o_proj": 40}
    )
    with Publisher(trainer, [llm], adapter="policy", timeout_s=60) as publisher:
        for _ in range(2):
            scatter(trainer)
            publisher.publish()
            running = Stepped(llm)
            running.add("own", PROMPTS[0], "policy")
            running.finish()
            assert running.tokens("own") == greedy(trainer, PROMPTS[0])
            assert_live(llm, trainer, running.done["own"].lora_request.lora_int_id)


def test_an_adapter_of_vllms_own_goes_on_beside(llm: Any, model: Path, tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    trainer, own = trainer_of(model), trainer_of(model, "own", target_modules=["q_proj", "down_proj"])
    own.save_pretrained(tmp_path)
    request = LoRARequest("own", 1, str(tmp_path / "own"))
    with Publisher(trainer, [llm], adapter="policy", timeout_s=60) as publisher:
        for _ in range(2):
            publisher.publish()
            (output,) = llm.generate([{"prompt_token_ids": PROMPTS[0]}], params(), use_tqdm=False, lora_request=request)
            assert list(output.outputs[0].token_ids) == greedy(own, PROMPTS[0])
            assert tokens_of(llm, PROMPTS[0]) == greedy(trainer, PROMPTS[0])
            scatter(trainer)
        llm.llm_engine.remove_lora(1)
