"""Field: a fleet of two engine processes and a trainer, and what must be true of them whatever is done to one of them."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from weightcast.errors import RoundFailed, WeightcastError
from weightcast.report.model import Report
from weightcast.testing.engine_process import SLICE_NBYTES, TOKEN, EngineProcess, values_of
from weightcast.testing.matrix.outcome import Outcome, expect
from weightcast.testing.processes import start_fork_server
from weightcast.testing.trainer_process import TrainerProcess
from weightcast.trainer.clients import EngineClient
from weightcast.trainer.publisher import Publisher

DEADLINE_S, GPU_DEADLINE_S = 1.5, 8.0
"""Of a publish that a fault strikes. Processes that share one GPU take turns on it."""
GRACE_S = 2.0
"""An error may come so long after the deadline."""
HEALING_S, GPU_HEALING_S = 15.0, 45.0
"""Of all other publishes. Kernels may have to be compiled in them."""
GPU_SLACK = 40
"""Descriptors and threads that CUDA and NCCL open at their first use and keep for as long as the process lives."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What this process holds."""

    descriptors: int
    threads: int
    children: int

    @classmethod
    def now(cls) -> Usage:
        gc.collect()
        return cls(len(os.listdir("/proc/self/fd")), threading.active_count(), len(multiprocessing.active_children()))

    def exceeds(self, before: Usage, slack: int) -> bool:
        return (
            self.descriptors > before.descriptors + slack
            or self.threads > before.threads + slack
            or self.children > before.children
        )


@dataclass(slots=True)
class Failure:
    """How a publish failed: its error, the causes by name of engine, the time it took."""

    error: WeightcastError
    causes: dict[str, str]
    seconds: float

    @property
    def kinds(self) -> str:
        """The causes' classes."""
        return ", ".join(sorted(set(self.causes.values())) or [type(self.error).__name__])

    @property
    def outcome(self) -> Outcome:
        return Outcome(self.kinds, self.seconds)


class Field:
    """Two engines: ``a``, to which things happen, and ``b``, which must not notice. A context manager that checks for leaks."""

    def __init__(
        self,
        transport: str,
        mode: str,
        *,
        require: str = "all",
        loader: bool = False,
        relocatable: bool = True,
        device: str = "cpu",
        host: str = "127.0.0.1",
        address: str | None = None,
        netns: str | None = None,
        silence_s: float = 5.0,
    ) -> None:
        self.transport, self.mode, self.device = transport, mode, device
        self._slack = 0 if device == "cpu" else GPU_SLACK
        self.healing_s = HEALING_S if device == "cpu" else GPU_HEALING_S
        self.deadline_s = DEADLINE_S if device == "cpu" else GPU_DEADLINE_S
        self.options: dict[str, Any] = {
            "transport": transport,
            "mode": mode,
            "require": require,
            "address": address,
            "bucket_nbytes": SLICE_NBYTES,
            "silence_s": silence_s,
        }
        self._engine_options: dict[str, Any] = {"loader": loader, "relocatable": relocatable, "device": device}
        self._network: dict[str, Any] = {"host": host, "netns": netns}
        self._stack = contextlib.ExitStack()
        self.seed = 0
        self.tensors = values_of(0, device)
        self.seeds: dict[int, int] = {0: 0}
        self.publisher: Publisher | None = None
        self.trainer: TrainerProcess | None = None

    def __enter__(self) -> Field:
        start_fork_server()
        self._before = Usage.now()
        try:
            self.a = self._own(EngineProcess(self.mode, **self._engine_options, **self._network))
            self.b = self._own(EngineProcess(self.mode, **self._engine_options))
            self._usage = {engine: engine.call("usage") for engine in (self.a, self.b)}
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if self.publisher is not None:
                start = time.monotonic()
                self.publisher.close()
                if kind is None:
                    expect(time.monotonic() - start < 5, "close() took longer than five seconds")
                    self._check_engines_for_leaks()
        finally:
            self._stack.close()
        self.publisher = self.trainer = None
        if kind is None:
            self._check_leaks()

    def _own(self, process: Any) -> Any:
        self._stack.callback(process.close)
        return process

    def _check_leaks(self) -> None:
        end = time.monotonic() + 3
        while (now := Usage.now()).exceeds(self._before, self._slack):
            expect(time.monotonic() < end, f"leaked: {self._before} became {now}: {_descriptors()}")
            time.sleep(0.05)

    def _check_engines_for_leaks(self) -> None:
        """Engines that lived through all of it hold what they held before the first trainer came."""
        end = time.monotonic() + 3
        for engine, before in self._usage.items():
            while engine.alive:
                now = engine.call("usage")
                if all(now[kind] <= before[kind] + self._slack for kind in before):
                    break
                expect(time.monotonic() < end, f"{engine.url} leaked: {before} became {now}")
                time.sleep(0.05)

    # -- trainers

    def start(
        self, engines: Sequence[str | EngineClient] | None = None, *, publish: bool = True, **options: Any
    ) -> Publisher:
        """A trainer in this process, connected; with ``publish`` the engines serve its first version."""
        expect(self.publisher is None, "one trainer at a time")
        self.publisher = Publisher(
            self.tensors,
            list(engines) if engines is not None else [self.a.url, self.b.url],
            token=TOKEN,
            **{"timeout_s": self.healing_s, **self.options, **options},
        )
        if publish:
            self.succeed()
        return self.publisher

    def stop(self) -> None:
        """The trainer of this process leaves."""
        assert self.publisher is not None
        self.publisher.close()
        self.publisher = None

    def second(self, **options: Any) -> Publisher:
        """Another trainer for the same engines, not connected; close it."""
        return Publisher(
            self.tensors,
            [self.a.url, self.b.url],
            token=TOKEN,
            **{"timeout_s": self.healing_s, **self.options, **options},
        )

    def start_trainer(self, **options: Any) -> TrainerProcess:
        """A trainer in a process of its own; the engines serve its first version."""
        self.trainer = self._own(
            TrainerProcess(
                [self.a.url, self.b.url], device=self.device, **{**self.options, "timeout_s": self.healing_s, **options}
            )
        )
        expect(self.trainer is not None, "no trainer")
        answer = self.trainer.call("publish", self.next_seed(1), self.healing_s, timeout_s=self.healing_s + 10)
        expect(answer["version"], f"the first publish failed: {answer}")
        return self.trainer

    def next_seed(self, number: int) -> int:
        """Fresh values, to be published as this version."""
        self.seed += 1
        self.seeds[number] = self.seed
        return self.seed

    def next_number(self) -> int:
        assert self.publisher is not None
        return self.publisher._next_number()

    def change(self) -> None:
        """What an optimizer's step does."""
        self.tensors.update(values_of(self.next_seed(self.next_number()), self.device))

    def succeed(self, timeout_s: float | None = None, *, engines: Sequence[EngineProcess] | None = None) -> Report:
        """Publish new values: everybody (or ``engines``) must hold them afterwards."""
        assert self.publisher is not None
        self.change()
        seed = self.seed
        report = self.publisher.publish(timeout_s if timeout_s is not None else self.healing_s)
        for engine in engines if engines is not None else (self.a, self.b):
            expect(engine.call("holds", seed), f"{engine.url} does not hold what was published")
            expect(engine.call("state") == (report.version, False), f"{engine.url} is {engine.call('state')}")
        if engines is None:
            expect(report.ok, f"not ok: {report.engines}")
            expect(report.digests_match, "digests differ")
        return report

    def fail(self, timeout_s: float | None = None) -> Failure:
        """Publish new values: that must end with a named error by deadline + 2 s."""
        assert self.publisher is not None
        timeout_s = timeout_s if timeout_s is not None else self.deadline_s
        self.change()
        start = time.monotonic()
        try:
            report = self.publisher.publish(timeout_s)
        except WeightcastError as error:
            seconds = time.monotonic() - start
            expect(seconds <= timeout_s + GRACE_S, f"the error came after {seconds:.1f} s: {error}")
            causes = error.causes if isinstance(error, RoundFailed) else {error.engine or "": error}
            for each in (error, *causes.values()):
                forget_frames(each)
            expect(causes, f"the error names no cause: {error}")
            expect(error.phase and (error.round or error.phase in ("join", "setup")), f"where was it? {error}")
            expect(error.hint, f"what is to be done? {error}")
            for name, cause in causes.items():
                expect(cause.engine == name and cause.phase, f"who and where? {cause}")
            return Failure(error, {name: type(cause).__name__ for name, cause in causes.items()}, seconds)
        raise AssertionError(f"published in spite of the fault: {report}")

    def heal(self, timeout_s: float | None = None) -> None:
        """The next round works, for everybody, and the one after it."""
        self.succeed(timeout_s)
        self.succeed(timeout_s)

    def replace(self) -> None:
        """The victim is dead; a new process takes its place."""
        expect(self.a.ends(), "the victim should be dead")
        self.a = self._own(self.a.successor())

    # -- what must be true

    def consistent(self, *engines: EngineProcess) -> None:
        """Each engine holds exactly the values of the version that it says it serves, or says that it is dirty."""
        for engine in engines:
            version, dirty = engine.call("state")
            if not dirty:
                seed = self.seeds[0 if version == "default" else int(version.partition("-")[0])]
                expect(engine.call("holds", seed), f"{engine.url} does not hold {version}")

    def steady(self, *engines: EngineProcess, number: int | None = None) -> None:
        """Each engine serves version n, clean, to the byte. In place only the bystander's rule holds: consistent."""
        self.consistent(*engines)
        if self.mode == "in_place":
            return
        wanted = number if number is not None else max(self.seeds) - 1
        for engine in engines:
            version, dirty = engine.call("state")
            served = 0 if version == "default" else int(version.partition("-")[0])
            expect(not dirty, f"{engine.url} is dirty")
            expect(served == wanted, f"{engine.url} serves {version} instead of version {wanted}")

    def steady_after(self, failure: Failure) -> None:
        """Both engines serve version n, as the error says, and the next rounds work."""
        self.steady(self.a, self.b)
        self.told_truly(failure, self.a, self.b)
        self.heal()

    def told_truly(self, failure: Failure, *engines: EngineProcess) -> None:
        """What the error says about these engines is what they serve."""
        error = failure.error
        if isinstance(error, RoundFailed):
            for engine in engines:
                version, dirty = engine.call("state")
                said = error.serving.get(engine.url)
                expect(dirty == (engine.url in error.dirty), f"dirty is {dirty}, the error says {error}")
                expect(dirty or said in (version, "unknown"), f"serves {version}, the error says {said}")


def _descriptors() -> list[str]:
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(f"{number}: {os.readlink(f'/proc/self/fd/{number}')}")
    return found


def forget_frames(error: BaseException) -> None:
    """The frames of an error keep what they used alive, which is no leak."""
    found: list[BaseException | None] = [error]
    seen: set[int] = set()
    while found:
        link = found.pop()
        if link is not None and id(link) not in seen:
            seen.add(id(link))
            link.__traceback__ = None
            found += [link.__cause__, link.__context__]
