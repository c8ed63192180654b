"""Field: a fleet of two engine processes and a trainer, and what must be true of them whatever is done to one of them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from tests.support.bare_engine import Snapshot
from tests.support.engine_process import SLICE_NBYTES, SPARSE, TOKEN, EngineProcess, values_of
from tests.support.processes import start_fork_server
from tests.support.trainer_process import TrainerProcess
from tests.trials.matrix.failure import Failure
from tests.trials.matrix.leaks import Leaks
from tests.trials.matrix.outcome import expect
from weightcast.errors import WeightcastError
from weightcast.report.model import Report
from weightcast.trainer.clients import EngineClient
from weightcast.trainer.publisher import Publisher

DEADLINE_S, GPU_DEADLINE_S = 1.5, 8.0
"""Of a publish that a fault strikes. Processes that share one GPU take turns on it."""
GRACE_S = 2.0
"""An error may come so long after the deadline."""
HEALING_S, GPU_HEALING_S = 15.0, 45.0
"""Of all other publishes. Kernels may have to be compiled in them."""
UNHURRIED_S = 4.0
"""At least, of a publish whose deadline is not the point: a busy machine may stand still for a moment."""
RESUMES_S = 3.0
"""An engine that ended a commit goes on within this time."""
UNKNOWN, DIRTY = "unknown", "dirty"
DELTA = "delta"
"""In the place of a transport: rounds over tcp that send what changed, between values few of which differ."""


class Field:
    """Two engines: ``a``, to which things happen, and ``b``, which must not notice. A context manager that checks for leaks."""

    def __init__(
        self,
        transport: str,
        mode: str,
        *,
        require: str = "all",
        num_workers: int = 1,
        loader: bool = False,
        relocatable: bool = True,
        device: str = "cpu",
        host: str = "127.0.0.1",
        address: str | None = None,
        netns: str | None = None,
        silence_s: float = 5.0,
        relay: bool = False,
    ) -> None:
        self.transport, self.mode, self.device = transport, mode, device
        self.healing_s = HEALING_S if device == "cpu" else GPU_HEALING_S
        self.deadline_s = DEADLINE_S if device == "cpu" else GPU_DEADLINE_S
        self.unhurried_s = max(UNHURRIED_S, self.deadline_s)
        self.options: dict[str, Any] = {
            "transport": "tcp" if transport == DELTA else transport,
            "delta": transport == DELTA,
            "mode": mode,
            "require": require,
            "address": address,
            "bucket_nbytes": SLICE_NBYTES,
            "silence_s": silence_s,
        }
        self._engine_options: dict[str, Any] = {"loader": loader, "relocatable": relocatable, "device": device}
        self._relay = relay
        """Whether the engines feed each other, in the order in which a trainer gets them."""
        self._only_a: dict[str, Any] = {"num_workers": num_workers, "host": host, "netns": netns}
        self._stack = contextlib.ExitStack()
        self.seed = SPARSE if transport == DELTA else 0
        self.tensors = values_of(0, device)
        self.seeds: dict[int, int] = {0: 0}
        self.publisher: Publisher | None = None
        self.trainer: TrainerProcess | None = None
        self.seconds = 0.0
        """How long the last publish took that succeeded."""
        self.version = "default"
        """What it published."""

    def __enter__(self) -> Field:
        start_fork_server()
        self._leaks = Leaks(on_gpu=self.device != "cpu")
        try:
            self.a = self._own(EngineProcess(self.mode, **self._engine_options, **self._only_a))
            self.b = self._own(EngineProcess(self.mode, **self._engine_options))
            for engine in (self.a, self.b):
                self._leaks.watch(engine)
            self.options["relay"] = [[self.a.url, self.b.url]] if self._relay else False
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self._leave(well=kind is None)
        finally:
            self._stack.close()
        self.publisher = self.trainer = None
        if kind is None:
            self._leaks.check_own()

    def _leave(self, *, well: bool) -> None:
        """Whoever trains leaves, quickly, and engines that lived through all of it hold what they held before."""
        start = time.monotonic()
        if self.publisher is not None:
            self.publisher.close()
        if well:
            if self.trainer is not None and self.trainer.alive:
                self.trainer.call("close")
            expect(time.monotonic() - start < 5, "close() took longer than five seconds")
            self._leaks.check_engines()

    def _own(self, process: Any) -> Any:
        self._stack.callback(process.close)
        return process

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
        return self.publisher._first_rank("next number").next_number()

    def change(self) -> None:
        """What an optimizer's step does."""
        self.tensors.update(values_of(self.next_seed(self.next_number()), self.device))

    def succeed(self, timeout_s: float | None = None, *, engines: Sequence[EngineProcess] | None = None) -> Report:
        """Publish new values: everybody (or ``engines``) must hold them afterwards."""
        assert self.publisher is not None
        self.change()
        start = time.monotonic()
        report = self.publisher.publish(timeout_s=timeout_s if timeout_s is not None else self.healing_s)
        self.seconds = time.monotonic() - start
        self.seeds[report.number] = self.seed  # a higher one than expected when engines knew more than the trainer
        self.version = report.version
        for engine in engines if engines is not None else (self.a, self.b):
            now = self.look(engine)
            expect(now.holds, f"{engine.url} does not hold what was published")
            expect((now.version, now.dirty) == (report.version, False), f"{engine.url} is {now}")
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
            report = self.publisher.publish(timeout_s=timeout_s)
        except WeightcastError as error:
            seconds = time.monotonic() - start
            expect(seconds <= timeout_s + GRACE_S, f"the error came after {seconds:.1f} s: {error}")
            return Failure.of(error, seconds)
        raise AssertionError(f"published in spite of the fault: {report}")

    def heal(self, timeout_s: float | None = None) -> None:
        """The next round works, for everybody, and the one after it."""
        self.succeed(timeout_s)
        report = self.succeed(timeout_s)
        codecs = {worker.codec for engine in report.engines for worker in engine.workers}
        expect(codecs == {"delta" if self.transport == DELTA else "dense"}, f"what came is {codecs}")

    def replace(self) -> None:
        """The victim is dead; a new process takes its place."""
        expect(self.a.ends(), "the victim should be dead")
        self.a = self._own(self.a.successor())
        self._leaks.watch(self.a)

    # -- what must be true

    def look(self, engine: EngineProcess) -> Snapshot:
        """What an engine is once no commit is half-way; it must not stay paused."""
        end = time.monotonic() + RESUMES_S
        while (now := engine.snapshot(self.seeds)).paused:
            expect(time.monotonic() < end, f"{engine.url} stays paused")
            time.sleep(0.01)
        return now

    def consistent(self, *engines: EngineProcess, cut_off: bool = False) -> None:
        """Each engine holds exactly the values of the version that it says it serves. In place the victim may say that it is
        dirty instead, and so may whoever was ``cut_off`` from a trainer while it received."""
        for engine in engines:
            now = self.look(engine)
            if now.dirty:
                expect(self.mode == "in_place" and (cut_off or engine is self.a), f"{engine.url} is dirty")
            else:
                expect(now.holds, f"{engine.url} does not hold {now.version}")

    def steady(self, *engines: EngineProcess, number: int | None = None, cut_off: bool = False) -> None:
        """Each engine serves version n, clean, to the byte. In place only what ``consistent`` says holds."""
        self.consistent(*engines, cut_off=cut_off)
        if self.mode == "in_place":
            return
        wanted = number if number is not None else max(self.seeds) - 1
        for engine in engines:
            version = self.look(engine).version
            served = 0 if version == "default" else int(version.partition("-")[0])
            expect(served == wanted, f"{engine.url} serves {version} instead of version {wanted}")

    def steady_after(self, failure: Failure) -> None:
        """Both engines serve version n, as the error says, and the next rounds work."""
        self.steady(self.a, self.b)
        self.told_truly(failure, self.a, self.b)
        self.heal()

    def told_truly(self, failure: Failure, *engines: EngineProcess) -> None:
        """What the error says about these engines, which could be asked, is what they serve."""
        for engine in engines:
            now = self.look(engine)
            serves, said = DIRTY if now.dirty else now.version, failure.says_of(engine.url)
            expect(said == serves, f"{engine.url} is {serves}, the error says {said}: {failure.error}")

    def told_carefully(self, failure: Failure) -> None:
        """What the error says about the victim, which cannot be asked: version n when it cannot have committed, else unknown."""
        said, allowed = failure.says_of(self.a.url), {self.version, UNKNOWN}
        if self.mode == "in_place":
            allowed.add(DIRTY)
        expect(said in allowed, f"the error says that {self.a.url} serves {said}: {failure.error}")
