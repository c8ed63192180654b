"""Everything in this folder needs a CUDA GPU; without one it is skipped, with the reason."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ALONE = "WEIGHTCAST_TEST_IS_ALONE"

# NCCL refuses two ranks on one GPU of one host; every process that the tests start calls itself a host of its own.
os.environ.setdefault("NCCL_HOSTID", f"test-{os.getpid()}")
os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
# NCCL's own monitoring keeps a connection to every process it ever met, for as long as this one lives.
os.environ.setdefault("NCCL_RAS_ENABLE", "0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(missing)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Failures are told at once: a run with a time limit may not come to its summary."""
    if report.failed:
        print(f"\n---- {report.nodeid}, {report.when}\n{report.longreprtext[-6000:]}", flush=True)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test marked ``alone`` in a process of its own.

    vLLM takes what is alive while an engine starts out of garbage collection: an engine that was in the process before keeps its
    memory, and the next one stumbles over it.
    """
    if pyfuncitem.get_closest_marker("alone") is None or os.environ.get(ALONE):
        return None
    config = pyfuncitem.config
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short"]
    command += ["--show-capture=no", "-c", str(config.inipath), "--rootdir", str(config.rootpath), pyfuncitem.nodeid]
    done = subprocess.run(command, env=os.environ | {ALONE: "1"}, cwd=config.rootpath, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-1000:]
    return True
