"""Leaks: what the trainer's process and engines hold before a cell, and must not exceed after it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from tests.support.engine_process import EngineProcess
from tests.support.footprint import Footprint
from tests.trials.matrix.outcome import expect

GPU_SLACK = 40
"""Descriptors and threads that CUDA and NCCL open at their first use and keep for as long as the process lives."""
ANY_NBYTES = 2**62
"""Resident memory is the soak's to judge: a cell is too short for it."""
PATIENCE_S = 3.0
"""Threads that were told to end take a moment."""


class Leaks:
    """Counts descriptors, threads and shared memory of processes, as the kernel does, and children of this one."""

    def __init__(self, *, on_gpu: bool) -> None:
        self._slack = GPU_SLACK if on_gpu else 0
        self._children = len(multiprocessing.active_children())
        self._mine = self._allowed(Footprint.now())
        self._engines: dict[EngineProcess, Footprint] = {}

    def watch(self, engine: EngineProcess) -> None:
        """This engine is to hold no more at the end than it does now."""
        self._engines[engine] = self._allowed(engine.call("footprint"))

    def check_engines(self) -> None:
        """AssertionError for an engine that lives and holds more. One that is stopped has to be continued before."""
        for engine, before in self._engines.items():
            if engine.alive:
                _wait_until_none(partial(_growth_of, engine, before), engine.url)

    def check_own(self) -> None:
        """AssertionError when this process holds more."""
        _wait_until_none(lambda: Footprint.now().growth(self._mine, ANY_NBYTES), "the trainer's process")
        children = multiprocessing.active_children()
        expect(len(children) <= self._children, f"processes are left: {children}")

    def _allowed(self, now: Footprint) -> Footprint:
        return replace(now, descriptors=now.descriptors + self._slack, threads=now.threads + self._slack)


def _growth_of(engine: EngineProcess, before: Footprint) -> str | None:
    now = engine.call("footprint")
    assert isinstance(now, Footprint)
    return now.growth(before, ANY_NBYTES)


def _wait_until_none(growth: Callable[[], str | None], who: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while (grown := growth()) is not None:
        expect(time.monotonic() < end, f"{who} leaked: {grown}; here are open {_descriptors()}")
        time.sleep(0.05)


def _descriptors() -> list[str]:
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(f"{number}: {os.readlink(f'/proc/self/fd/{number}')}")
    return found
