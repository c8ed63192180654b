"""A Publisher that nobody closed: what it opened ends with it."""

from __future__ import annotations

import gc
import logging
import os
import threading
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from weightcast import Publisher
from weightcast.deadline import Deadline
from weightcast.errors import EngineError, StateError
from weightcast.testing.local_engine import DictModel, LocalEngine


def weights() -> dict[str, torch.Tensor]:
    return {"w": torch.randn(5, 3)}


def open_here() -> tuple[int, set[str]]:
    threads = {thread.name for thread in threading.enumerate() if thread.name.startswith("weightcast")}
    return len(os.listdir("/proc/self/fd")), threads


def settle(before: tuple[int, set[str]]) -> None:
    gc.collect()
    limit = Deadline(20)
    while (now := open_here())[0] > before[0] or now[1] > before[1]:
        limit.check(f"ending what the publisher opened: {now} of {before}")
        threading.Event().wait(0.02)


def test_a_publisher_that_could_not_connect_and_was_dropped_leaves_nothing_open() -> None:
    engine = LocalEngine("e", [DictModel(weights())])
    try:
        engine.refuse("init")
        before = open_here()
        publisher = Publisher(weights(), [engine], timeout_s=10)
        with pytest.raises(EngineError, match="no init today"):
            publisher.connect()
        assert open_here()[0] > before[0]
        del publisher
        settle(before)
    finally:
        engine.stop()


def test_engines_of_a_dropped_publisher_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """An end without ``close()`` is an orderly one, too: a script that is over says goodbye, and nobody has to look at its engines."""
    caplog.set_level(logging.INFO, "weightcast")
    engine = LocalEngine("e", [DictModel(weights())])
    try:
        publisher = Publisher(weights(), [engine], timeout_s=10)
        version = publisher.publish().version
        receiver = engine.workers[0].receiver  # type: ignore[attr-defined]
        assert receiver.joined
        del publisher
        gc.collect()
        limit = Deadline(20)
        while receiver.joined:
            limit.check("hearing that the trainer left")
            threading.Event().wait(0.02)
        assert engine.workers[0].weight_version == version
        (told,) = (record for record in caplog.records if "the trainer left" in record.message)
        assert told.levelno == logging.INFO
        with Publisher(weights(), [engine], timeout_s=10) as successor:  # without takeover
            assert successor.publish().digests_match
    finally:
        engine.stop()


def _pairs(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    yield from tensors.items()


@pytest.mark.parametrize("kind", ["mapping", "module", "stream"])
def test_a_closed_publisher_that_is_kept_keeps_nothing_of_its_source(kind: str) -> None:
    module: nn.Module | None = nn.Linear(4, 3)
    assert module is not None
    tensors: dict[str, torch.Tensor] | None = {
        name: torch.randn_like(value) for name, value in module.state_dict().items()
    }
    assert tensors is not None
    engine = LocalEngine("e", [DictModel({name: torch.zeros_like(value) for name, value in tensors.items()})])
    kept = [*module.parameters(), *tensors.values()]
    alive = [weakref.ref(value) for value in kept]
    source: Any = {"mapping": tensors, "module": module, "stream": partial(_pairs, tensors)}[kind]
    publisher = Publisher(source, [engine], timeout_s=20)
    assert publisher.publish().digests_match
    publisher.close()
    engine.stop()
    del module, tensors, kept, source
    gc.collect()
    assert [ref() for ref in alive] == [None] * len(alive)
    with pytest.raises(StateError, match=r"the publisher is closed\. Make a new Publisher"):
        publisher.publish()
    assert publisher.last_report is not None
