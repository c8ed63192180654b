"""Soak: thousands of rounds on a small model, some of which fail, with engines that leave and come back; nothing may grow."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.support.engine_process import SLICE_NBYTES, TOKEN, EngineProcess, values_of
from tests.support.footprint import Footprint
from tests.support.processes import start_fork_server
from weightcast.errors import RoundFailed
from weightcast.trainer.publisher import Publisher

TIMEOUT_S = 20.0
FAILS_EVERY, LEAVES_EVERY, CHECKED_EVERY = 25, 40, 20
MORE_TIMES = 2
"""How often a run that seems to have grown is made longer by half."""
WARM_UP_ROUNDS = 500
"""After so many (or half of them) everything has been done more than once, and allocators have fragmented as far as they do
(engines that leave and come back take 12 MB more in the first 500 rounds, none after): nothing needs more from then on."""
REST_S = 2.0
MEMORY_NBYTES = 6 * 2**20
"""What a process may take beyond: allocators keep what they fragment. 1,500 rounds that leaked one copy of the model each
would take 1.7 GB, one kilobyte each 1.5 MB per direction and engine."""


@dataclass(slots=True)
class Soaked:
    """What a run found: footprints by process after warming up and at the end, and what grew."""

    rounds: int = 0
    failed: int = 0
    seconds: float = 0.0
    before: dict[str, Footprint] = field(default_factory=dict)
    after: dict[str, Footprint] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def grown(self) -> list[str]:
        """What grew, by process."""
        grown = {name: self.after[name].growth(before, MEMORY_NBYTES) for name, before in self.before.items()}
        return [f"{name} grew: {growth}" for name, growth in grown.items() if growth is not None]

    def __str__(self) -> str:
        lines = [
            f"{self.rounds} rounds in {self.seconds:.0f} s ({self.seconds / max(1, self.rounds) * 1e3:.1f} ms each), "
            f"{self.failed} of them made to fail"
        ]
        for name, before in self.before.items():
            lines.append(f"{name}:\n  after warming up {before}\n  at the end       {self.after.get(name)}")
        return "\n".join([*lines, *(self.faults or ["nothing grew"])])


class Soak:
    """One run: two engines, staged over shm and in place over tcp by turns of the publisher's choice."""

    def __init__(self, *, transport: str = "shm", modes: tuple[str, ...] = ("staged", "in_place")) -> None:
        self._transport, self._modes = transport, modes

    def run(self, rounds: int, tell: Callable[[str], None] = lambda line: None) -> Soaked:
        """Play the rounds; the result lists what grew."""
        start_fork_server()
        found, tensors = Soaked(), values_of(0)
        engines = [EngineProcess(mode) for mode in self._modes]
        options = {"transport": self._transport, "timeout_s": TIMEOUT_S, "bucket_nbytes": SLICE_NBYTES}
        start = time.monotonic()
        try:
            with Publisher(tensors, [engine.url for engine in engines], token=TOKEN, **options) as publisher:  # type: ignore[arg-type]
                for number in range(rounds):
                    self._next(publisher, engines, number, tensors, found)
                    if number == min(WARM_UP_ROUNDS, rounds // 2):
                        found.before = _footprints_at_rest(engines)
                    if number and number % 250 == 0:
                        tell(f"round {number}: {_footprints(engines)['trainer']}")
                found.after = _footprints_at_rest(engines)
                for _ in range(MORE_TIMES):
                    if not found.grown():
                        break
                    # An allocator gives memory back when it likes: what was kept for good is still there after more rounds.
                    for _ in range(rounds // 2):
                        self._next(publisher, engines, found.rounds, tensors, found)
                    now = _footprints_at_rest(engines)
                    found.after = {name: found.after[name].least(now[name]) for name in now}
        finally:
            for engine in engines:
                engine.close()
        found.seconds = time.monotonic() - start
        found.faults += found.grown()
        return found

    def _next(
        self, publisher: Publisher, engines: list[EngineProcess], number: int, tensors: dict[str, Any], found: Soaked
    ) -> None:
        tensors.update(values_of(number + 1))
        self._round(publisher, engines, number, found)

    def _round(self, publisher: Publisher, engines: list[EngineProcess], number: int, found: Soaked) -> None:
        seed = number + 1
        engine = engines[number // FAILS_EVERY % len(engines)]
        fails = number % FAILS_EVERY == FAILS_EVERY - 1
        if fails:
            engine.arm("transfer:end", "corrupt")
        try:
            report = publisher.publish()
        except RoundFailed:
            if not fails:
                raise
            found.failed += 1
        else:
            if fails:
                found.faults.append(f"round {number} was published in spite of corrupted bytes")
            elif number % CHECKED_EVERY == 0 and not all(each.call("holds", seed) for each in engines):
                found.faults.append(f"an engine does not hold {report.version}")
        if number % LEAVES_EVERY == LEAVES_EVERY - 1:
            leaver = engines[number // LEAVES_EVERY % len(engines)]
            publisher.remove(leaver.url)
            publisher.add(leaver.url)
        found.rounds += 1


def _footprints_at_rest(engines: list[EngineProcess]) -> dict[str, Footprint]:
    """The least that is held within a while: the last round may have failed, or an engine just left, and what that ended
    takes a moment to go."""
    least = _footprints(engines)
    end = time.monotonic() + REST_S
    while time.monotonic() < end:
        time.sleep(0.2)
        least = {name: now.least(least[name]) for name, now in _footprints(engines).items()}
    return least


def _footprints(engines: list[EngineProcess]) -> dict[str, Footprint]:
    every = {"trainer": Footprint.now()}
    for number, engine in enumerate(engines):
        every[f"engine {number} ({engine.mode})"] = engine.call("footprint")
    return every
