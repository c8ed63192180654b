"""Two GPUs: a vLLM server with two workers that sleeps between rounds, and gives back what it held of trainers on both cards."""

from __future__ import annotations

import os
from pathlib import Path

import httpx
import pytest
import torch
from card import TOLERANCE, change, in_use, large_model, module_of, until_in_use_is_below
from gpu_vllm import vllm_server
from tests.support.verified import comparison

from weightcast import Publisher
from weightcast.testing.models import save_checkpoint

pytest.importorskip("vllm", reason="needs vLLM")
pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.timeout(400),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

CARDS = (0, 1)


@pytest.mark.parametrize("mode", ["auto", "staged"])
def test_rounds_around_the_sleep_of_two_workers(tmp_path: Path, mode: str) -> None:
    large = large_model(tmp_path / "m")
    options = ("--tensor-parallel-size", "2", "--enforce-eager", "--enable-sleep-mode")
    devices = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0,1"), "VLLM_SERVER_DEV_MODE": "1"}
    with vllm_server(large, "weightcast", *options, **devices) as server:
        token = server.token  # type: ignore[attr-defined]
        server.answers()

        def fall_asleep() -> None:
            httpx.post(f"{server.url}/sleep?level=2", timeout=60, trust_env=False).raise_for_status()

        module, nbytes = module_of(large)
        for card in CARDS:
            torch.zeros(1, device=f"cuda:{card}")
        awake = [in_use(card) for card in CARDS]
        with Publisher(module, [server.url], token=token, timeout_s=100, mode=mode) as publisher:
            for number in range(3):
                if number:
                    fall_asleep()
                values = change(module)
                freed: list[int] = []

                def release(freed: list[int] = freed) -> None:
                    held = in_use()
                    module.to("cpu")
                    torch.cuda.empty_cache()
                    freed.append(held - in_use())

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
        until_in_use_is_below(*(then + 2 * TOLERANCE for then in awake), cards=CARDS)
        fall_asleep()
        asleep = [in_use(card) for card in CARDS]
        assert all(then - now > nbytes // 2 - TOLERANCE for now, then in zip(asleep, awake, strict=True))
