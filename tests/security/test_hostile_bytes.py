"""A worker that joined with all its secrets and writes nonsense on its own data connection: no process ends, and the others' rounds go on."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

import pytest
import torch
from tests.support.forked import run_forked

from weightcast import Publisher
from weightcast.deadline import Deadline
from weightcast.testing.local_engine import DictModel, LocalEngine

NONSENSE = {"64 bytes": struct.pack("=QQQQQQQQ", *range(8)), "many": os.urandom(3_000_000), "hangs up": b""}


def values() -> dict[str, torch.Tensor]:
    return {"a": torch.randn(300, 300), "b": torch.randn(77)}


def say(engine: LocalEngine, nonsense: bytes) -> None:
    """On each data connection of the engine's worker."""
    for pair in engine.workers[0].receiver._session.pairs._pairs:  # type: ignore[union-attr]
        for connection in pair.end._lanes._connections:  # type: ignore[attr-defined]
            if nonsense:
                connection.send([nonsense[:100_000]], Deadline(10), "talking nonsense")
            else:
                connection.socket.shutdown(socket.SHUT_RDWR)


def play(kind: str) -> None:
    """In a process of its own, whose end would be seen."""
    good, hostile = (LocalEngine(name, [DictModel(values())], mode="staged") for name in ("good", "hostile"))
    weights = values()
    with Publisher(weights, [hostile, good], transport="tcp", timeout_s=20, require="live") as publisher:
        for number in range(4):
            for name, value in values().items():
                weights[name].copy_(value)
            if number % 2:
                say(hostile, NONSENSE[kind])
            report = publisher.publish()
            told = {engine.name: engine for engine in report.engines}
            assert told["good"].ok
            assert {worker.transport for worker in told["good"].workers} == {"tcp"}
            assert good.models[0].holds(weights)
            assert not told["hostile"].ok or hostile.models[0].holds(weights)
    for engine in (good, hostile):
        engine.stop()
    print("went on")


@pytest.mark.parametrize("kind", NONSENSE)
def test_nonsense_on_a_data_connection_ends_no_trainer(kind: str) -> None:
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_hostile_bytes as t; t.play({kind!r})"
    status, printed = run_forked(code, environment=os.environ, timeout_s=100)
    assert (status, printed.splitlines()[-1]) == (0, "went on"), printed[-3000:]
