"""A vLLM server whose trainer is killed, or loses the server to another trainer: the card has as much free as before they came."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from card import TOLERANCE, change, in_use, large_model, module_of, until_in_use_is_below
from gpu_vllm import vllm_server
from tests.support.verified import comparison

from weightcast import Publisher
from weightcast.testing.models import save_checkpoint

pytest.importorskip("vllm", reason="needs vLLM")
pytest.importorskip("triton", reason="needs a CUDA build of torch")

pytestmark = [pytest.mark.alone, pytest.mark.filterwarnings("default"), pytest.mark.timeout(300)]

TRAINER = """
import faulthandler, sys
from pathlib import Path
faulthandler.dump_traceback_later(60, exit=True)
from card import change, module_of
from weightcast import Publisher

model, url, token, mode = sys.argv[1:]
module, _ = module_of(Path(model))
publisher = Publisher(module, [url], token=token, timeout_s=100, mode=mode)
for _ in range(2):
    change(module)
    print(publisher.publish().version, flush=True)
faulthandler.cancel_dump_traceback_later()
sys.stdin.read()
"""


def killed_after_two_rounds(model: Path, url: str, token: str, mode: str) -> str:
    """Have a process publish twice, then kill it. Returns the last version."""
    command = [sys.executable, "-c", TRAINER, str(model), url, token, mode]
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths}
    )
    try:
        assert process.stdout is not None
        versions = [process.stdout.readline().strip() for _ in range(2)]
        assert all(versions), "the trainer ended by itself"
        return versions[-1]
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("mode", ["in_place", "staged"])
def test_no_memory_stays_when_a_trainer_is_killed(tmp_path: Path, mode: str) -> None:
    large = large_model(tmp_path / "m")
    with vllm_server(large, "weightcast", "--enforce-eager") as server:
        token = server.token  # type: ignore[attr-defined]
        torch.zeros(1, device="cuda")
        server.answers()
        before = in_use()
        version = killed_after_two_rounds(large, server.url, token, mode)
        until_in_use_is_below(before + TOLERANCE)
        assert server.complete([7])
        module, nbytes = module_of(large)
        values = change(module)
        torch.cuda.empty_cache()
        with Publisher(module, [server.url], token=token, timeout_s=100, mode=mode) as publisher:
            assert publisher.publish().version != version
            folder = save_checkpoint(tmp_path / "v", values, like=large)
            assert comparison(server.url, token, folder).proven
        until_in_use_is_below(before + nbytes + TOLERANCE)


def test_one_shadow_whoever_holds_the_server(tmp_path: Path) -> None:
    """A second trainer takes the server over while the first still runs: the first one's shadow and mappings go."""
    large = large_model(tmp_path / "m")
    with vllm_server(large, "weightcast", "--enforce-eager") as server:
        token = server.token  # type: ignore[attr-defined]
        modules = [module_of(large) for _ in range(2)]
        (_, nbytes), _ = modules
        values = change(modules[1][0])
        torch.cuda.empty_cache()
        server.answers()
        before = in_use()
        with Publisher(modules[0][0], [server.url], token=token, timeout_s=100, mode="staged") as first:
            first.publish()
            one = in_use()
            assert one - before > nbytes - TOLERANCE, "the shadow is seen"
            with Publisher(
                modules[1][0], [server.url], token=token, timeout_s=100, mode="staged", takeover=True
            ) as second:
                second.publish()
                until_in_use_is_below(one + TOLERANCE)
                folder = save_checkpoint(tmp_path / "v", values, like=large)
                assert comparison(server.url, token, folder).proven
        until_in_use_is_below(before + TOLERANCE)
