"""Hints of the embedded engine: the mistake, the hint, and the hint followed."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.support.mistakes import Mistake
from torch import nn

from weightcast import Publisher
from weightcast.engines.embedded import LLM, EngineConfig, SamplingParams, attention, loading
from weightcast.engines.embedded.core import EngineCore
from weightcast.engines.embedded.given import check_given, device_of
from weightcast.engines.embedded.live_model import EmbeddedModel
from weightcast.engines.embedded.support import check_config, check_model
from weightcast.engines.sampling import StructuredOutputs
from weightcast.errors import InvalidInput, PlanMismatch, PromptTooLong, StateError, Unsupported
from weightcast.manifest import TensorSpec
from weightcast.manifest.adapters import Factors
from weightcast.testing.models import build_tiny_model
from weightcast.weight_transfer.config import WeightTransferConfig
from weightcast.weight_transfer.factory import WeightTransferEngineFactory

OTHER_ENGINE = "Serve it with vLLM, or use another architecture"
LONG = {"rope_type": "longrope", "original_max_position_embeddings": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("hints") / "m", "qwen3")


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    engine = LLM(folder, num_threads=1, max_model_len=32)
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def wordless(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """An engine without a tokenizer."""
    bare = tmp_path_factory.mktemp("bare")
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((folder / name).read_bytes())
    engine = LLM(bare, num_threads=1, max_model_len=32)
    yield engine
    engine.shutdown()


def _given(**arguments: Any) -> Callable[[], None]:
    return lambda: check_given(EngineConfig(**arguments))


GIVEN: dict[str, Callable[[Path], Mistake]] = {
    "too many threads": lambda folder: Mistake(
        make=_given(model=folder, num_threads=5000), error=InvalidInput, said="num_threads 5000 is more than",
        hint="This machine has .* cores", follow=_given(model=folder, num_threads=1),
    ),
    "device that is none": lambda folder: Mistake(
        make=lambda: device_of("tpu"), error=InvalidInput, said="no device 'tpu'", hint="Choose cpu",
        follow=lambda: device_of("cpu"),
    ),
    "device that is not here": lambda folder: Mistake(
        make=lambda: device_of("cuda:99"), error=InvalidInput, said="device cuda:99 was asked for, and torch sees",
        hint="another device, cpu say; `weightcast doctor`", follow=lambda: device_of("cpu"),
    ),
    "no name": lambda folder: Mistake(
        make=_given(model=""), error=InvalidInput, said="model is empty", hint="Give a folder",
        follow=_given(model=str(folder)),
    ),
    "folder without a model": lambda folder: Mistake(
        make=_given(model=folder.parent), error=InvalidInput, said="has no config.json",
        hint="the folder that save_pretrained wrote", follow=_given(model=folder),
    ),
    "file of a model": lambda folder: Mistake(
        make=_given(model=folder / "config.json"), error=InvalidInput, said="is a file, and the model is a folder",
        hint=f"Give the folder: {folder}$", follow=_given(model=folder),
    ),
    "path to nowhere": lambda folder: Mistake(
        make=_given(model="./nowhere"), error=InvalidInput, said="there is no folder .*nowhere",
        hint="Give a folder, or a hub's name", follow=_given(model="Qwen/Qwen3-0.6B"),
    ),
    "folder without a tokenizer": lambda folder: Mistake(
        make=lambda: loading.load_tokenizer(EngineConfig(model=folder, tokenizer=str(folder.parent))), error=InvalidInput,
        said="no tokenizer can be read from", hint="without tokenizer= the model's own is taken",
        follow=lambda: loading.load_tokenizer(EngineConfig(model=folder)),
    ),
    "tokens of a step": lambda folder: Mistake(
        make=lambda: EngineConfig(model=folder, max_num_seqs=8, max_num_batched_tokens=4), error=InvalidInput,
        said="max_num_batched_tokens 4 is less than max_num_seqs 8", hint="one token per step",
        follow=lambda: EngineConfig(model=folder, max_num_seqs=8, max_num_batched_tokens=8),
    ),
    "a type that nobody computes in": lambda folder: Mistake(
        make=lambda: EngineConfig(model=folder, dtype="float8_e4m3fn"), error=InvalidInput,
        said="dtype is auto, float32 or .*, not 'float8_e4m3fn'", hint="Correct the value",
        follow=lambda: EngineConfig(model=folder, dtype="bfloat16"),
    ),
    "several workers": lambda folder: Mistake(
        make=lambda: EngineConfig(model=folder, tensor_parallel_size=2), error=Unsupported,
        said="tensor_parallel_size=2: the embedded engine runs one worker", hint="Start several engines",
        follow=lambda: [EngineConfig(model=folder) for _ in range(2)],
    ),
    "keys and values of less than a sequence": lambda folder: Mistake(
        make=lambda: loading.kv_capacity(EngineConfig(model=folder, kv_cache_tokens=16), 64, 8, torch.device("cpu")),
        error=InvalidInput, said="kv_cache_tokens 16 is less than max_model_len 64", hint="smaller max_model_len",
        follow=lambda: loading.kv_capacity(EngineConfig(model=folder, kv_cache_tokens=16), 16, 8, torch.device("cpu")),
    ),
    "no such backend": lambda folder: Mistake(
        make=lambda: WeightTransferEngineFactory.engine_class("x"), error=Unsupported, said="backend 'x'",
        hint="Known: .*nccl.*weightcast", follow=lambda: WeightTransferEngineFactory.engine_class("weightcast"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GIVEN)
def test_what_an_engine_is_started_with(name: str, folder: Path) -> None:
    GIVEN[name](folder).play()


def test_memory_that_cannot_be_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "host_room_nbytes", lambda: None)
    Mistake(
        make=lambda: loading.kv_capacity(EngineConfig(model=folder), 64, 8, torch.device("cpu")), error=InvalidInput,
        said="how much memory is free", hint="Give kv_cache_tokens",
        follow=lambda: loading.kv_capacity(EngineConfig(model=folder, kv_cache_tokens=64), 64, 8, torch.device("cpu")),
    ).play()  # fmt: skip


def test_weights_that_may_not_be_trusted(folder: Path, tmp_path: Path) -> None:
    """A model whose weights are pickled, and one that brings code: neither is read, and the hint names what would be."""
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")

    def convert() -> None:
        (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
        LLM(tmp_path, num_threads=1, max_model_len=32).shutdown()

    Mistake(
        make=lambda: LLM(tmp_path, num_threads=1), error=InvalidInput, said="cannot be loaded",
        hint=r"Convert the weights to safetensors.*--trust-remote-code", follow=convert,
    ).play()  # fmt: skip
    for error, said in (
        ("The repository contains custom code. Please pass trust_remote_code=True", "Read the code that comes with it"),
        ("We couldn't connect to the hub", "Check the name and the network, or give the folder"),
    ):
        assert said in str(loading._hint(ValueError(error)))


# -- models


def _config(**fields: Any) -> Any:
    made = SimpleNamespace(model_type="m", **fields)
    made.get_text_config = lambda: made
    return made


MODELS: dict[str, tuple[Callable[[], object], str]] = {
    "encoder and decoder": (lambda: check_config(_config(is_encoder_decoder=True), None), "encoder-decoder"),
    "layers": (lambda: check_config(_config(layer_types=["linear_attention"]), None), "linear_attention"),
    "dynamic": (lambda: check_config(_config(rope_parameters={"rope_type": "dynamic"}), None), "dynamic rotary"),
    "longrope of no length": (lambda: check_config(_config(rope_parameters={"rope_type": "longrope"}), None), "longrope"),
    "attention": (lambda: check_model(nn.Linear(1, 1)), "AttentionInterface"),
    "no head": (
        lambda: check_model(type("M", (), {"_supports_attention_backend": True, "get_output_embeddings": lambda s: None})()),
        "no language model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models_that_cannot_be_run_exactly(name: str) -> None:
    make, said = MODELS[name]
    Mistake(make=make, error=Unsupported, said=said, hint=OTHER_ENGINE).play()


def test_a_scaling_that_changes_with_the_length() -> None:
    config = _config(rope_parameters=LONG, original_max_position_embeddings=64, max_position_embeddings=512)
    Mistake(
        make=lambda: check_config(config, None), error=Unsupported, said="longrope", hint="Give max_model_len=64$",
        follow=lambda: check_config(config, 64),
    ).play()  # fmt: skip


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"others": {"s_aux": 1}}, "asks attention for s_aux"),
        ({"step": None}, "does not pass keyword arguments"),
        ({"attention_mask": torch.ones(1)}, "mask of its own"),
        ({"is_causal": False}, "both directions"),
        ({"dropout": 0.5}, "asks for dropout"),
        ({}, "has no layer_idx"),
    ],
)
def test_attention_that_is_not_the_packed_one(given: dict[str, Any], said: str) -> None:
    plain = {"step": object(), "attention_mask": None, "dropout": 0.0, "is_causal": None, "others": {}}
    Mistake(
        make=lambda: attention._checked(nn.Linear(1, 1), **{**plain, **given}),
        error=Unsupported, said=f"Linear.*{said}", hint=OTHER_ENGINE,
    ).play()  # fmt: skip


def _sharing(clone: bool) -> Any:
    """A model of two parameters that share some bytes but not all, or one of a clone."""
    module: Any = nn.Module()
    whole = torch.randn(8)
    module.a, module.b = nn.Parameter(whole[:6]), nn.Parameter(whole[4:].clone() if clone else whole[4:])
    return module


def test_parameters_that_no_arena_can_hold() -> None:
    Mistake(
        make=lambda: EmbeddedModel(_sharing(False)), error=Unsupported, said="a and b share some bytes",
        hint="Clone one of them", follow=lambda: EmbeddedModel(_sharing(True)),
    ).play()  # fmt: skip
    scattered: Any = nn.Linear(2, 2)
    scattered.bias = nn.Parameter(torch.empty(2, device="meta"))
    Mistake(
        make=lambda: EmbeddedModel(scattered), error=Unsupported, said="bias is not on cpu", hint="on one device",
        follow=lambda: EmbeddedModel(nn.Linear(2, 2)),  # type: ignore[arg-type]
    ).play()  # fmt: skip


# -- requests


def test_words_for_an_engine_that_knows_token_ids_only(wordless: LLM) -> None:
    Mistake(
        make=lambda: wordless.generate("a tale"), error=InvalidInput, said="no tokenizer", hint="Send token ids",
        follow=lambda: wordless.generate([1, 2, 3], SamplingParams(max_tokens=1)),
    ).play()  # fmt: skip
    Mistake(
        make=lambda: wordless.generate([1, 2], SamplingParams(stop=["x"])), error=InvalidInput, said="stop strings need",
        hint="Use stop_token_ids", follow=lambda: wordless.generate([1, 2], SamplingParams(stop_token_ids=[3], max_tokens=1)),
    ).play()  # fmt: skip


def test_a_prompt_that_is_too_long(llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The error is all that is said of it: the tokenizer's library warns of indexing errors, which there are none of."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(llm.engine.text.tokenizer, "model_max_length", 32)
    monkeypatch.setattr(llm.engine.text.tokenizer, "deprecation_warnings", {})
    one = SamplingParams(max_tokens=1)
    Mistake(
        make=lambda: llm.generate("q" * 50, one), error=PromptTooLong, said="maximum context length is 32 tokens. However",
        hint="Please reduce the length of the prompt", follow=lambda: llm.generate("q" * 5, one),
    ).play()  # fmt: skip
    assert "indexing errors" not in caplog.text


def test_a_conversation_without_a_template(llm: LLM) -> None:
    text = llm.engine.text
    template, text.tokenizer.chat_template = text.tokenizer.chat_template, None
    try:
        Mistake(
            make=lambda: text.chat([{"role": "user", "content": "hi"}]), error=InvalidInput, said="no chat template",
            hint="Send a plain prompt", follow=lambda: llm.generate("hi", SamplingParams(max_tokens=1)),
        ).play()  # fmt: skip
    finally:
        text.tokenizer.chat_template = template


def test_updates_before_a_trainer_came(folder: Path) -> None:
    engine = LLM(folder, num_threads=1, max_model_len=32)

    def publish() -> None:
        with Publisher({n: v.clone() for n, v in engine.engine.model.state_dict().items()}, [engine]) as publisher:
            assert publisher.publish().digests_match

    try:
        Mistake(
            make=engine.start_weight_update, error=StateError, said="not initialised",
            hint="Call init_weight_transfer_engine first", follow=publish,
        ).play()  # fmt: skip
    finally:
        engine.shutdown()


def test_an_engine_that_waits_for_its_first_weights(folder: Path) -> None:
    config = WeightTransferConfig(backend="weightcast", wait_for_weights=True)
    engine = LLM(folder, num_threads=1, max_model_len=32, weight_transfer_config=config)
    try:

        def publish() -> None:
            with Publisher({n: v.clone() for n, v in engine.engine.model.state_dict().items()}, [engine]) as publisher:
                publisher.publish()
            engine.generate([1, 2], SamplingParams(max_tokens=1))

        Mistake(
            make=lambda: engine.generate([1, 2]), error=StateError, said="does not serve now", hint="Publish to it",
            follow=publish,
        ).play()  # fmt: skip
    finally:
        engine.shutdown()


def _factors(dtype: str, rows: int, columns: int) -> Factors:
    a, b = (TensorSpec(name=name, dtype=dtype, shape=shape) for name, shape in (("a", (2, columns)), ("b", (rows, 2))))
    return Factors(a=a, b=b)


def test_adapters_that_this_engine_cannot_compute(llm: LLM) -> None:
    adapters = llm.engine.core.adapters
    module = "model.layers.0.mlp.down_proj"
    rows, columns = llm.engine.model.get_submodule(module).weight.shape
    (name,) = [each for each in adapters.linears.able if module.endswith(each)]

    def check(module: str, dtype: str) -> None:
        adapters.check("policy", {module: _factors(dtype, rows, columns)})

    for bad, dtype, error, said in (
        ("layers.7.nowhere", "float32", PlanMismatch, r"has no linear layers layers\.7\.nowhere"),
        (name, "int8", Unsupported, "the adapter of .* is of type int8"),
    ):
        Mistake(
            make=partial(check, bad, dtype), error=error, said=said, hint="Publish the merged weights",
            follow=partial(check, name, "float32"),
        ).play()  # fmt: skip


def test_adapters_for_parts_of_experts_and_more_of_them_than_fit(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = llm.engine.core.adapters
    module = next(iter(adapters.linears.able))
    rows, columns = adapters.linears.able[module].weight.shape
    others = {"mlp.experts": object()}
    monkeypatch.setattr(adapters, "linears", SimpleNamespace(able=adapters.linears.able, others=others))
    Mistake(
        make=lambda: adapters.check("policy", {"mlp.experts": _factors("float32", rows, columns)}), error=Unsupported,
        said="mlp.experts: this engine computes adapters for layers that see every token", hint="Publish the merged weights",
    ).play()  # fmt: skip
    wanted = adapters.max_adapters + 3

    def as_the_hint_says() -> None:
        monkeypatch.setattr(adapters, "max_adapters", wanted)
        adapters.check_room("policy", wanted)

    Mistake(
        make=lambda: adapters.check_room("policy", wanted), error=StateError,
        said=f"no slot is free for 'policy': 0 of {adapters.max_adapters} are taken, {wanted} more are needed",
        hint=f"max_adapters={wanted} or more", follow=as_the_hint_says,
    ).play()  # fmt: skip


def test_a_pause_that_waits_for_the_last_request_and_is_taken_back() -> None:
    core: Any = EngineCore.__new__(EngineCore)
    core.paused, core._draining, core._drained, core._arrivals = False, None, [], 1
    core.requests = {"r": SimpleNamespace(arrival=0)}
    core._settle_drain = lambda: None  # the request goes on
    waiting = core.pause("wait", False)
    core.resume()
    Mistake(
        make=lambda: waiting.result(0), error=StateError, said="resumed before all requests had finished", hint="Pause again",
    ).play()  # fmt: skip


def test_a_grammar_without_its_library(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask() -> None:
        llm.generate("x", SamplingParams(structured_outputs=StructuredOutputs(regex="a"), max_tokens=2))

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "llguidance", None)
        patch.setattr(llm.engine._grammars, "_loaded", None)
        Mistake(
            make=ask, error=Unsupported, said="answers of a given form need llguidance", hint=r"pip install 'weightcast\[grammar\]'",
        ).play()  # fmt: skip
    ask()
