"""Runs an example as its user does, in a process group that ends with it."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
REWARDS = re.compile(r"^reward (\d\.\d+) -> (\d\.\d+)$", re.MULTILINE)


def run_example(name: str, *arguments: str, timeout_s: float) -> str:
    """What it printed; AssertionError with its errors when it failed."""
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLES / name), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
    )
    try:
        printed, errors = process.communicate(timeout=timeout_s)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 0, f"{printed[-2000:]}\n{errors[-6000:]}"
    return printed


def learnt(printed: str) -> float:
    """How much the reward rose over the run."""
    found = REWARDS.search(printed)
    assert found is not None, printed[-2000:]
    return float(found[2]) - float(found[1])
