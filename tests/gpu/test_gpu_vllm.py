"""weightcast inside stock vLLM on a GPU: after a publish its tokens equal those of a fresh load, CUDA graphs included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_vllm import answers, embedded_server, engine, through_loader, tiny_model, vllm_server
from tests.support.verified import comparison

from weightcast import Publisher
from weightcast.testing.models import random_state_dict, save_checkpoint
from weightcast.testing.ports import free_port

pytest.importorskip("vllm", reason="needs vLLM")
pytest.importorskip("triton", reason="needs a CUDA build of torch")

pytestmark = [pytest.mark.alone, pytest.mark.filterwarnings("default"), pytest.mark.timeout(180)]


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def on_gpu(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.cuda() for name, value in weights.items()}


def two_checkpoints(tmp_path: Path, arch: str) -> tuple[tuple[Path, dict[str, torch.Tensor]], ...]:
    model = tiny_model(tmp_path / "m", arch)
    found = []
    for name in ("a", "b"):
        weights = random_state_dict(model)
        found.append((save_checkpoint(tmp_path / name, weights, like=model), weights))
    return tuple(found)


def check_both_ways(tmp_path: Path, arch: str, mode: str, shadows: int = 1, **options: Any) -> tuple[str, ...]:
    """Engines that start with A and with B, and are published the other one, and their own again."""
    (path_a, a), (path_b, b) = two_checkpoints(tmp_path, arch)
    seen: dict[str, list[list[int]]] = {}
    loaded: tuple[str, ...] = ()
    for own, other, path, first, second in (("b", "a", path_b, a, b), ("a", "b", path_a, b, a)):
        with engine(path, **options) as llm:
            fresh = answers(llm)
            source = on_gpu(first)
            with Publisher(source, [llm], timeout_s=60, mode=mode, shadows=shadows) as publisher:
                report = publisher.publish()
                assert report.digests_match
                assert report.engines[0].workers[0].transport == "cuda_ipc"
                foreign = answers(llm)
                for name, value in second.items():
                    source[name].copy_(value)
                assert publisher.publish().digests_match
                assert answers(llm) == fresh, f"{own} after its own weights were published again"
                loaded = through_loader(llm)
        assert foreign != fresh
        assert seen.setdefault(own, fresh) == fresh
        assert seen.setdefault(other, foreign) == foreign, f"{other} by publish() and by a fresh load"
    return loaded


@pytest.mark.parametrize(
    ("arch", "mode", "shadows"),
    [("qwen3", "in_place", 1), ("qwen3", "staged", 2), ("qwen3_tied", "staged", 1), ("qwen3_moe", "in_place", 1)],
)
def test_direct_layouts(tmp_path: Path, arch: str, mode: str, shadows: int) -> None:
    assert check_both_ways(tmp_path, arch, mode, shadows) == ()


def test_an_engine_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer's memory is mapped into vLLM's process."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    (path_a, _), (_, b) = two_checkpoints(tmp_path, "qwen3")
    source = on_gpu(b)
    with engine(path_a) as llm:
        before = answers(llm)
        with Publisher(source, [llm], timeout_s=60, mode="in_place") as publisher:
            report = publisher.publish()
            assert report.engines[0].workers[0].transport == "cuda_ipc"
            after = answers(llm)
            for value in source.values():
                value.copy_(torch.randn(value.shape))
            publisher.publish()
            assert answers(llm) != after != before
            for name, value in b.items():
                source[name].copy_(value)
            publisher.publish()
            assert answers(llm) == after


@pytest.mark.parametrize("transport", ["cuda_ipc", "nccl"])
def test_a_server_with_the_plug_in(tmp_path: Path, transport: str) -> None:
    (_, a), (path_b, b) = two_checkpoints(tmp_path, "qwen3")
    source = on_gpu(a)
    with vllm_server(path_b, "weightcast", "--enforce-eager") as server:
        fresh = server.answers()
        assert comparison(server.url, server.token, path_b).proven, "live weights are as loaded, before any round"
        with Publisher(source, [server.url], token=server.token, transport=transport, timeout_s=60) as publisher:  # type: ignore[attr-defined]
            assert publisher.publish().digests_match
            assert server.answers() != fresh
            assert set(comparison(server.url, server.token, path_b).different) == set(b)
            for name, value in b.items():
                source[name].copy_(value)
            assert publisher.publish().digests_match
            assert server.answers() == fresh
            assert set(comparison(server.url, server.token, path_b).equal) == set(b)


def test_our_trainer_drives_a_stock_server(tmp_path: Path) -> None:
    """vLLM's own nccl backend; weightcast cannot be imported over there."""
    from weightcast.vllm_protocol.nccl.trainer import VllmNativePublisher

    (_, a), (path_b, b) = two_checkpoints(tmp_path, "qwen3")
    source = on_gpu(a)
    with vllm_server(path_b, "nccl", "--enforce-eager") as server:
        fresh = server.answers()
        with VllmNativePublisher(source, server.url, timeout_s=60, buffer_nbytes=1 << 20) as publisher:
            publisher.connect()
            publisher.publish("first")
            assert server.answers() != fresh
            for name, value in b.items():
                source[name].copy_(value)
            publisher.publish("second")
            assert server.answers() == fresh


def test_a_stock_trainer_drives_our_server(tmp_path: Path) -> None:
    """vLLM's NCCL trainer client, packed, against ``weightcast serve``."""
    import threading

    import httpx
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerSendWeightsArgs, NCCLWeightTransferEngine

    (_, a), (path_b, b) = two_checkpoints(tmp_path, "qwen3")
    with embedded_server(path_b, '{"backend": "nccl"}') as server:
        fresh = server.answers()
        port = free_port()
        meeting = {"master_address": "127.0.0.1", "master_port": port, "world_size": 2}

        def post(path: str, body: Any = None) -> None:
            response = httpx.post(server.url + path, json=body, timeout=60, trust_env=False)
            assert response.status_code == 200, response.text

        def beside(path: str, body: Any) -> threading.Thread:
            thread = threading.Thread(target=post, args=(path, body))
            thread.start()
            return thread

        joining = beside("/init_weight_transfer_engine", {"init_info": {**meeting, "rank_offset": 1}})
        group = NCCLWeightTransferEngine.trainer_init(meeting)
        joining.join(60)
        for weights, is_own in ((a, False), (b, True)):
            tensors = on_gpu(weights)
            post("/pause?mode=keep")
            post("/start_weight_update")
            update = {
                "names": list(tensors),
                "dtype_names": [str(value.dtype).partition(".")[2] for value in tensors.values()],
                "shapes": [list(value.shape) for value in tensors.values()],
                "packed": True,
            }
            receiving = beside("/update_weights", {"update_info": update})
            arguments = NCCLTrainerSendWeightsArgs(group=group, packed=True)
            NCCLWeightTransferEngine.trainer_send_weights(iter(tensors.items()), arguments)
            receiving.join(60)
            post("/finish_weight_update")
            post("/resume")
            assert (server.answers() == fresh) == is_own
