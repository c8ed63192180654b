"""A program that ends without having closed anything ends as if it had: no thread is left inside of torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from weightcast.testing.models import build_tiny_model

BUSY = """
import sys, threading, time, torch

def busy(entered: threading.Event) -> None:
    '''In torch, where other threads have Python's lock, for a second.'''
    side = torch.randn(400, 400)
    end = time.monotonic() + 1
    while time.monotonic() < end:
        for _ in range(20):
            torch.mm(side, side)
        entered.set()

entered = threading.Event()
"""
SESSION = """
from weightcast import Publisher
from weightcast.testing.local_engine import DictModel, LocalEngine

engine = LocalEngine("e", [DictModel({"w": torch.randn(3)})])
publisher = Publisher({"w": torch.randn(3)}, [engine], transport="tcp", timeout_s=30)
publisher.publish()
engine.workers[0].receiver._session.run_later(lambda: busy(entered))
entered.wait(20)
"""
ENGINE = """
from weightcast.engines.embedded import LLM

llm = LLM(sys.argv[1], num_threads=1)
llm.engine.run_between_steps(lambda: busy(entered))
entered.wait(20)
"""

CLOSED_LAST = """
from weightcast import Publisher
from weightcast.testing.local_engine import DictModel, LocalEngine

class Trainer:
    '''Closes what it has when Python takes the program apart.'''
    def __init__(self) -> None:
        self.publisher = Publisher(torch.nn.Linear(3, 3), [engine], timeout_s=30)
    def __del__(self) -> None:
        self.publisher.close()

engine = LocalEngine("e", [DictModel({"weight": torch.randn(3, 3), "bias": torch.randn(3)})])
trainer, other = Trainer(), Trainer()
trainer.publisher.publish()
"""


@pytest.mark.timeout(300)  # a busy machine takes its time to import torch in two more processes
@pytest.mark.parametrize(
    "program", [SESSION, ENGINE, CLOSED_LAST], ids=["a worker's session", "an engine's thread", "closed last"]
)
def test_a_program_that_closes_nothing_ends_well(tmp_path: Path, program: str) -> None:
    model = build_tiny_model(tmp_path / "m")
    command = [sys.executable, "-c", BUSY + program + "print('done')", str(model)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr
    assert "Traceback" not in ended.stderr
