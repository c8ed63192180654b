"""Every model family: after each push, tokens and log-probabilities equal those of a fresh load of the same weights."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tests.vllm import offline
from tests.vllm.weights import replace

from weightcast import Publisher
from weightcast.errors import RoundFailed
from weightcast.record import record_layout
from weightcast.sources import make_source
from weightcast.testing.models import build_tiny_model, random_state_dict, save_checkpoint

HEAD = {"head_dim": 32}
MLA = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": HEAD,
    "qwen3": HEAD,
    "qwen3_tied": HEAD,
    "qwen3_moe": HEAD,
    "mistral": HEAD,
    "gemma2": HEAD,
    "gemma3": HEAD,
    "deepseek_v3": MLA,
}


def build(folder: Path, arch: str, **options: Any) -> Path:
    path = build_tiny_model(folder, arch, **{"dtype": "bfloat16", **FAMILIES[arch], **options})
    if arch == "deepseek_v3":
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "topk_method": "noaux_tc"}))
    return path


def pushed_and_fresh(
    path: Path,
    num_pushes: int = 2,
    mode: str = "auto",
    check: Callable[[Any], None] = lambda llm: None,
    **options: Any,
) -> None:
    """Push fresh random weights into one engine, then load each of them anew. ``check`` sees the engine after each push."""
    seen = []
    with offline.engine(path, **options) as llm:
        start = offline.answers(llm)
        weights = random_state_dict(path)
        with Publisher(weights, [llm], timeout_s=60, mode=mode) as publisher:
            for number in range(num_pushes):
                replace(weights, path)
                report = publisher.publish()
                assert report.digests_match
                assert llm.get_weight_version() == report.version
                check(llm)
                folder = save_checkpoint(path.parent / f"push-{number}", weights, like=path)
                seen.append((folder, offline.answers(llm)))
    assert start != seen[0][1] != seen[-1][1]
    for folder, got in seen:
        with offline.engine(folder, **options) as llm:
            assert offline.answers(llm) == got


@pytest.mark.parametrize("arch", FAMILIES)
def test_a_push_equals_a_fresh_load(tmp_path: Path, arch: str) -> None:
    pushed_and_fresh(build(tmp_path / "m", arch))


def test_a_quantised_model_takes_the_checkpoint_it_was_quantised_from(tmp_path: Path) -> None:
    path = build(tmp_path / "m", "qwen3", hidden_size=128, intermediate_size=256)
    seen = []

    def is_quantised(llm: Any) -> None:
        layer = model_of(llm).model.layers[0].mlp.down_proj
        assert layer.weight.dtype == torch.float8_e4m3fn
        seen.append(layer.weight.view(torch.uint8).clone())

    pushed_and_fresh(path, check=is_quantised, quantization="fp8_per_channel")
    first, second = seen
    assert not torch.equal(first, second), "what the layer computes with is what was pushed"


def test_tied_embeddings_that_go_through_the_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's reload packs the shared weight for one of the two layers; the other would go on with the old one."""
    from weightcast.engines.vllm import model as vllm_model

    name = "model.embed_tokens.weight"
    monkeypatch.setattr(vllm_model, "names_that_differ", lambda *_: {name})
    path = build(tmp_path / "m", "qwen3_tied")

    def goes_through(llm: Any) -> None:
        engine = worker_of(llm).weight_transfer_engine.calls.engine
        assert engine.receiver._session.layout.through_loader == (name,)

    pushed_and_fresh(path, check=goes_through)


def test_in_place_and_float32(tmp_path: Path) -> None:
    pushed_and_fresh(build(tmp_path / "m", "qwen3", dtype="float32"), mode="in_place")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("arch", ["qwen3", "qwen3_moe"])
def test_float32_masters_land_in_the_engines_own_types(tmp_path: Path, arch: str, dtype: torch.dtype | None) -> None:
    """Without vLLM's loader: values are cast where they land. The engine is in bfloat16."""
    path = build(tmp_path / "m", arch)
    seen = []
    with offline.engine(path) as llm:
        masters = {name: value.float() for name, value in random_state_dict(path).items()}
        with Publisher(masters, [llm], dtype=dtype, timeout_s=60) as publisher:
            for number in range(2):
                for name, value in random_state_dict(path).items():
                    masters[name] = value.float() * (1 + torch.rand_like(value, dtype=torch.float32) / 100)
                assert publisher.publish().digests_match
                engine = worker_of(llm).weight_transfer_engine.calls.engine
                through = engine.receiver._session.layout.through_loader
                assert all(".experts." in name for name in through), "packed ones only, as in the engine's own type"
                published = {n: (v if dtype is None else v.to(dtype)).bfloat16() for n, v in masters.items()}
                folder = save_checkpoint(tmp_path / f"push-{number}", published, like=path)
                seen.append((folder, offline.answers(llm)))
    assert seen[0][1] != seen[1][1]
    for folder, got in seen:
        with offline.engine(folder) as llm:
            assert offline.answers(llm) == got


def worker_of(llm: Any) -> Any:
    """The worker of an engine in this process."""
    return llm.llm_engine.model_executor.driver_worker.worker


def model_of(llm: Any) -> Any:
    return worker_of(llm).get_model()


def _fail_after(llm: Any, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """The model's own loader raises after it took ``count`` tensors, once."""
    model = model_of(llm)
    load = model.load_weights

    def failing(tensors: Any) -> Any:
        monkeypatch.setattr(model, "load_weights", load, raising=False)

        def some() -> Any:
            for number, item in enumerate(tensors):
                if number == count:
                    raise ValueError("the loader stumbled")
                yield item

        return load(some())

    monkeypatch.setattr(model, "load_weights", failing, raising=False)


@pytest.mark.parametrize("arch", ["deepseek_v3", "qwen3_moe"])
def test_a_loader_that_raises_half_way_leaves_version_n(
    tmp_path: Path, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build(tmp_path / "m", arch)
    with offline.engine(path) as llm:
        weights = random_state_dict(path)
        with Publisher(weights, [llm], timeout_s=60, mode="staged") as publisher:
            publisher.connect()
            for version in ("default", None):
                before = offline.answers(llm)
                version = version or llm.get_weight_version()
                replace(weights, path)
                _fail_after(llm, monkeypatch, 7)
                with pytest.raises(RoundFailed, match="the loader stumbled") as caught:
                    publisher.publish()
                assert caught.value.dirty == ()
                assert llm.get_weight_version() == version
                assert offline.answers(llm) == before
                publisher.publish()
                assert offline.answers(llm) != before


def test_packing_that_fails_half_way_leaves_version_n(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build(tmp_path / "m", "qwen3_tied")
    with offline.engine(path) as llm, Publisher(weights := random_state_dict(path), [llm], timeout_s=60) as publisher:
        version = publisher.publish().version
        before = offline.answers(llm)
        replace(weights, path)
        layer = model_of(llm).model.layers[1].mlp.down_proj
        with monkeypatch.context() as patch:
            patch.setattr(type(layer.quant_method), "process_weights_after_loading", _no_memory)
            with pytest.raises(RoundFailed, match="no room to pack"):
                publisher.publish()
        assert (offline.answers(llm), llm.get_weight_version()) == (before, version)
        publisher.publish()
        assert offline.answers(llm) != before


def _no_memory(method: Any, layer: Any) -> None:
    raise MemoryError("no room to pack")


def test_a_record_that_is_wrong_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of k_proj are said to land where those of v_proj do, and the other way round."""
    from weightcast.engines.vllm import model as vllm_model

    def misread(*args: Any) -> Any:
        recording = record_layout(*args)
        swapped = {
            f"model.layers.0.self_attn.{a}_proj.weight": f"model.layers.0.self_attn.{b}_proj.weight"
            for a, b in ("kv", "vk")
        }
        moved = {p.region.name: p for p in recording.layout.placements if p.region.name in swapped}
        placements = [
            msgspec.structs.replace(p, offset=moved[swapped[p.region.name]].offset) if p.region.name in swapped else p
            for p in recording.layout.placements
        ]
        layout = msgspec.structs.replace(recording.layout, placements=tuple(placements))
        return dataclasses.replace(recording, layout=layout)

    monkeypatch.setattr(vllm_model, "record_layout", misread)
    path = build(tmp_path / "m", "qwen3")
    pushed_and_fresh(path)
    with offline.engine(path) as llm:
        worker = worker_of(llm)
        model = vllm_model.VllmModel(worker.get_model(), worker.vllm_config, torch.device("cpu"))
        manifest = make_source(random_state_dict(path)).manifest
        through = set(model.layout(manifest).through_loader)
        assert through == {f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv"}
        monkeypatch.undo()
        model = vllm_model.VllmModel(worker.get_model(), worker.vllm_config, torch.device("cpu"))
        assert model.layout(manifest).through_loader == ()
