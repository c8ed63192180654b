"""Two GPUs: a vLLM server with two workers that sleeps between rounds, and gives back what it held of trainers on both cards."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from gpu_vllm import DIMENSIONS, vllm_server
from tests.support.verified import comparison

from weightcast import Publisher
from weightcast.testing.models import build_tiny_model, save_checkpoint

pytest.importorskip("vllm", reason="needs vLLM")
pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.timeout(400),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

TOLERANCE = 50 << 20
CARDS = (0, 1)


def in_use() -> list[int]:
    """Bytes in use on each card."""
    return [total - free for free, total in map(torch.cuda.mem_get_info, CARDS)]


def until_below(before: list[int], more: int) -> None:
    end = time.monotonic() + 20
    while any(now >= then + more for now, then in zip(in_use(), before, strict=True)):
        assert time.monotonic() < end, (in_use(), before)
        time.sleep(0.05)


@torch.no_grad()
def change(module: Any) -> dict[str, torch.Tensor]:
    """Fresh values, and a copy of them on the host."""
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, device=parameter.device) * 0.02)
    return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("mode", ["auto", "staged"])
def test_rounds_around_the_sleep_of_two_workers(tmp_path: Path, mode: str) -> None:
    from transformers import AutoModelForCausalLM

    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4}
    large = build_tiny_model(tmp_path / "m", "qwen3", "bfloat16", **{**DIMENSIONS, **sizes})
    options = ("--tensor-parallel-size", "2", "--enforce-eager", "--enable-sleep-mode")
    devices = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0,1"), "VLLM_SERVER_DEV_MODE": "1"}
    with vllm_server(large, "weightcast", *options, **devices) as server:
        token = server.token  # type: ignore[attr-defined]
        server.answers()

        def fall_asleep() -> None:
            httpx.post(f"{server.url}/sleep?level=2", timeout=60, trust_env=False).raise_for_status()

        module = AutoModelForCausalLM.from_pretrained(large, dtype=torch.bfloat16).cuda()
        nbytes = sum(parameter.nbytes for parameter in module.parameters())
        for card in CARDS:
            torch.zeros(1, device=f"cuda:{card}")
        awake = in_use()
        with Publisher(module, [server.url], token=token, timeout_s=100, mode=mode) as publisher:
            for number in range(3):
                if number:
                    fall_asleep()
                values = change(module)
                freed: list[int] = []

                def release(freed: list[int] = freed) -> None:
                    held = in_use()[0]
                    module.to("cpu")
                    torch.cuda.empty_cache()
                    freed.append(held - in_use()[0])

                report = publisher.publish(wake=True, release=release)
                assert report.digests_match
                assert freed[0] > nbytes - TOLERANCE
                assert comparison(
                    server.url, token, save_checkpoint(tmp_path / f"v{number}", values, like=large)
                ).proven
                server.answers()
                module.to("cuda")
            change(module)
            publisher.publish()
        until_below(awake, 2 * TOLERANCE)
        fall_asleep()
        asleep = in_use()
        assert all(then - now > nbytes // 2 - TOLERANCE for now, then in zip(asleep, awake, strict=True))
