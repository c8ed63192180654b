"""What the engine cannot run exactly it refuses at start, by name; bad arguments name their field."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from weightcast.engines.embedded import LLM, EngineConfig, attention, engine, loading
from weightcast.engines.embedded.support import probe
from weightcast.errors import InvalidInput, Unsupported
from weightcast.testing.models import build_tiny_model

_SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def _save_config(folder: Path, model_type: str, **fields: Any) -> Path:
    from transformers import AutoConfig

    AutoConfig.for_model(model_type, **fields).save_pretrained(folder)
    return folder


def test_attention_sinks(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "m", "gpt_oss")
    with pytest.raises(Unsupported, match=r"GptOss.*s_aux"):
        LLM(folder)


def test_hybrid_layers(tmp_path: Path) -> None:
    folder = _save_config(tmp_path, "qwen3_next", **_SMALL, num_attention_heads=2, num_key_value_heads=2)
    with pytest.raises(Unsupported, match=r"qwen3_next.*linear_attention"):
        LLM(folder, load_format="dummy")


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("bloom", {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 2}, "BloomForCausalLM"),
        ("mamba", {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2}, "mamba.*linear_attention"),
        ("t5", {"vocab_size": 97, "d_model": 32, "num_layers": 2}, "encoder-decoder"),
        ("vit", {}, "ViTConfig"),
    ],
)
def test_other_kinds_of_models(tmp_path: Path, model_type: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        LLM(_save_config(tmp_path, model_type, **fields), load_format="dummy")


def test_scaling_by_the_longest_sequence(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    folder = _save_config(
        tmp_path, "llama", **_SMALL, num_attention_heads=2, num_key_value_heads=2, rope_parameters=rope
    )
    with pytest.raises(Unsupported, match="dynamic"):
        LLM(folder, load_format="dummy")


def test_probe_notices_wrong_attention(build: Any, start: Any) -> None:
    """A model that hides something from the attention function is caught by its logits."""
    folder, _ = build("llama")
    model = start(folder).engine.model
    assert probe(model) == 2 * 2 * 2 * 16 * 8
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "hidden_states": kwargs["hidden_states"].cumsum(1)}),
            with_kwargs=True,
        )
    with pytest.raises(Unsupported, match="logits differ"):
        probe(model)


@pytest.mark.parametrize(("arch", "refused"), [("qwen3", True), ("qwen3_moe", False)])
def test_one_wrong_position_is_forgiven_where_experts_are_chosen(
    arch: str, refused: bool, build: Any, start: Any
) -> None:
    folder, _ = build(arch)
    model = start(folder).engine.model

    def spoil(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        if "step" not in kwargs and kwargs["input_ids"].shape[1] > 1:
            output.logits[0, 4] += 3 * output.logits[0, 4].flip(0)
        return output

    hook = model.register_forward_hook(spoil, with_kwargs=True)
    if refused:
        with pytest.raises(Unsupported, match="logits differ"):
            probe(model)
    else:
        probe(model)
    hook.remove()
    probe(model)


@pytest.mark.parametrize("arch", ["mistral", "gemma2", "gemma3"])
def test_the_probe_reaches_the_window_of_a_model(
    arch: str, build: Any, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own tokens are fewer than any window: a window that attention forgets must be noticed all the same."""
    folder, reference = build(arch, sliding_window=4096)
    model = start(folder).engine.model
    assert probe(model) > 0
    assert model.config.get_text_config().sliding_window == 4096
    windows = {getattr(module, "sliding_window", None) for module in model.modules()}
    assert windows == {getattr(module, "sliding_window", None) for module in reference.modules()}
    whole = attention._mask
    monkeypatch.setattr(attention, "_mask", lambda context, number, window, like: whole(context, number, None, like))
    with pytest.raises(Unsupported, match="logits differ"):
        probe(model)


def test_a_bias_on_attention_is_not_ignored(build: Any, start: Any) -> None:
    folder, _ = build("llama")
    model = start(folder).engine.model
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "attention_bias": torch.zeros(1)}), with_kwargs=True
        )
    with pytest.raises(Unsupported, match="attention_bias"):
        probe(model)


@pytest.mark.parametrize(
    ("kv_cache_tokens", "room", "field"),
    [(None, 1 << 30, None), (None, 1 << 10, "max_model_len"), (None, None, "kv_cache_tokens"), (512, None, None)],
)
def test_room_for_keys_and_values(
    kv_cache_tokens: int | None, room: int | None, field: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine whose memory is full of files that it could forget has no free pages, but room."""
    monkeypatch.setattr(os, "sysconf", lambda name: 0)
    monkeypatch.setattr(loading, "host_room_nbytes", lambda: room)
    config = EngineConfig(model="m", kv_cache_tokens=kv_cache_tokens)
    if field is None:
        assert loading.kv_capacity(config, 512, 64, torch.device("cpu")) >= 512
    else:
        with pytest.raises(InvalidInput) as caught:
            loading.kv_capacity(config, 512, 64, torch.device("cpu"))
        assert caught.value.field == field


@pytest.mark.parametrize("name", ["tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"])
def test_parallelism(name: str) -> None:
    with pytest.raises(Unsupported, match=name):
        EngineConfig(model="m", **{name: 2})
    EngineConfig(model="m", **{name: 1})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_num_seqs", 0),
        ("max_num_batched_tokens", 8),
        ("kv_cache_tokens", -1),
        ("load_format", "pickle"),
        ("max_model_len", 10**6),
        ("kv_cache_tokens", 100),
        ("dtype", "float7"),
    ],
)
def test_bad_arguments(tmp_path: Path, field: str, value: Any) -> None:
    folder = build_tiny_model(tmp_path / "m")
    with pytest.raises(InvalidInput) as caught:
        LLM(folder, **{field: value})
    assert caught.value.field == field


def test_dummy_weights_come_from_the_seed(tmp_path: Path, start: Any) -> None:
    folder = build_tiny_model(tmp_path / "m")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    before = torch.random.get_rng_state()
    weights = [
        start(folder, load_format="dummy", seed=seed).engine.model.get_input_embeddings().weight for seed in (5, 5, 6)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("given", "field", "said"),
    [
        ({"device": "tpu"}, "device", "no device 'tpu' to run on.*Choose cpu, cuda"),
        ({"device": "meta"}, "device", "no device 'meta'"),
        ({"device": "cuda:99"}, "device", "cuda:99 was asked for, and torch sees .*Choose another device"),
        ({"model": "./nope"}, "model", "there is no folder .*/nope.*Give a folder, or a hub's name"),
        ({"model": "~/nope/nope"}, "model", "there is no folder /.*~/nope/nope"),
        ({"model": Path("nope")}, "model", "there is no folder"),
        ({"model": ""}, "model", "model is empty"),
        ({"tokenizer": "/nope"}, "tokenizer", "there is no folder /nope"),
        ({"num_threads": 100_000}, "num_threads", "more than 1024.*This machine has"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_loaded(
    given: dict[str, Any], field: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "load_model", lambda config: pytest.fail("a model was loaded"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InvalidInput, match=said) as caught:
        LLM(**{"model": tmp_path, "device": "cpu", **given})
    assert caught.value.field == field


def test_a_folder_without_a_model_and_a_file_are_named_for_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=f"{tmp_path} has no config.json.*save_pretrained"):
        LLM(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InvalidInput, match=f"is a file, and the model is a folder. Give the folder: {tmp_path}"):
        LLM(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("backend", "said"), [("nccl", "needs a GPU"), ("x", "no weight transfer backend 'x'. Known: ")]
)
def test_a_backend_that_cannot_work_is_refused_before_the_model_is_read(
    backend: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(Unsupported, match=said):
        LLM(tmp_path / "nope", device="cpu", weight_transfer_config={"backend": backend})
