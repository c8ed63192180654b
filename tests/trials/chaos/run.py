"""Chaos: many rounds under load, while a seeded dice kills, stops and brings back trainer and engines."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.engine_process import TOKEN, EngineProcess
from tests.support.faults import Action
from tests.support.processes import ChildFailed, start_fork_server
from tests.trials.chaos.reference import Reference
from tests.trials.chaos.servers import Load, Server, ask, new_client
from tests.trials.chaos.trainer import ChaosTrainer
from weightcast.errors import DeadlineExceeded
from weightcast.testing.models import build_tiny_model

logger = logging.getLogger(__name__)

DEADLINE_S = 4.0
GRACE_S = 2.0
SLACK_S, HANGING_S = 1.0, 10.0
"""Servers that start take the cores; a process that waits for one is no process that hangs. The trainer's own clock counts."""
STARTING_S = 120.0
ANSWERING_S = 30.0
AFTER_FAILURE_S = 0.3
"""Without all engines a round may fail at once: others get the time to come back."""
RELAYED_SHARE = 0.3
"""Of trainers."""
INITIAL_SEED = 0
FIRST_WEIGHTS_SEED = 1000

EVENTS = {
    "nothing": 8,
    "kill engine": 3,
    "stop engine": 3,
    "corrupt engine": 2,
    "raise in engine": 2,
    "kill server": 1,
    "stop server": 2,
    "kill trainer": 2,
    "stop trainer": 1,
    "new trainer": 1,
}


@dataclass(slots=True)
class Summary:
    """What happened in a run; ``faults`` lists every broken promise."""

    seed: int
    rounds: int = 0
    committed: int = 0
    partly: int = 0
    failed: int = 0
    events: Counter[str] = field(default_factory=Counter)
    answers: int = 0
    tokens: int = 0
    mixed: int = 0
    refused: int = 0
    slowest_s: float = 0.0
    last_version: str = ""
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        events = ", ".join(f"{name} {count}" for name, count in self.events.most_common())
        return (
            f"seed {self.seed}: {self.rounds} rounds: {self.committed} committed ({self.partly} without an engine), "
            f"{self.failed} failed, the slowest took {self.slowest_s:.1f} s; last version {self.last_version}\n"
            f"{self.answers} answers with {self.tokens} tokens checked, {self.mixed} of them over several versions; "
            f"{self.refused} requests refused\n{events}\n"
            + ("no fault found" if not self.faults else f"{len(self.faults)} FAULTS:\n" + "\n".join(self.faults))
        )


class Chaos:
    """One run: ``run()`` once. Equal seeds make equal decisions; what the scheduler makes of them differs."""

    def __init__(self, folder: Path, *, seed: int, num_servers: int = 2, num_engines: int = 2) -> None:
        self._random = random.Random(seed)
        self._folder = folder
        self._checkpoint = build_tiny_model(
            folder / "model",
            "qwen3",
            "float64",
            INITIAL_SEED,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
        )
        start_fork_server("tests.trials.chaos.trainer", "transformers.models.auto.modeling_auto")
        self._reference = Reference(self._checkpoint, INITIAL_SEED)
        modes = ["staged", "in_place"]
        self._servers = [Server(self._checkpoint, folder, i, modes[i % 2]) for i in range(num_servers)]
        # Those in place have two workers: one of them alone must never be of another version.
        self._engines = [
            EngineProcess(modes[i % 2], num_workers=1 + i % 2, checkpoint=str(self._checkpoint))
            for i in range(num_engines)
        ]
        self._stopped_engines: set[int] = set()
        self._trainer: ChaosTrainer | None = None
        self._weights_seed = FIRST_WEIGHTS_SEED
        self._highest = 0
        self._troubled = False
        self._was_whole = False
        """The last round reached everybody: nobody has to join again in the next one."""
        self.summary = Summary(seed)

    def run(self, rounds: int, *, max_s: float = float("inf")) -> Summary:
        """Play rounds (fewer when ``max_s`` are over), then bring everybody back and compare everything."""
        with ExitStack() as stack:
            stack.callback(self._close)
            for server in self._servers:
                server.start()
            self._wait_for_servers()
            load = Load(self._servers, self._reference, self.summary.seed)
            load.start()
            stack.callback(load.close)
            end = time.monotonic() + max_s
            for number in range(rounds):
                if time.monotonic() >= end or self.summary.faults or load.faults:
                    break
                self._round(number)
            self._finish(load)
            load.close()
            summary = self.summary
            summary.answers, summary.tokens = load.num_answers, load.num_tokens
            summary.mixed, summary.refused = load.num_mixed, load.num_refused
            summary.faults += load.faults
        return self.summary

    # -- one round

    def _round(self, number: int) -> None:
        event = self._random.choices(list(EVENTS), weights=list(EVENTS.values()))[0]
        delay_s = self._random.choice([0.0, 0.02, 0.05, 0.1, 0.2])
        self._troubled = event != "nothing" or not self._all_up() or not self._was_whole
        before = getattr(self, "_before_" + event.replace(" ", "_"), None)
        if before is not None:
            before()
        trainer = self._present_trainer()
        self._weights_seed += 1
        self._reference.announce(self._weights_seed)
        self.summary.rounds += 1
        self.summary.events[event] += 1
        logger.info("round %d: %s after %.2f s", number, event, delay_s)
        call = trainer.start("publish", self._weights_seed, DEADLINE_S)
        strike: Callable[[], None] | None = getattr(self, "_strike_" + event.replace(" ", "_"), None)
        if strike is not None:
            timer = threading.Timer(delay_s, strike)
            timer.start()
            timer.join()
        self._hear(trainer, call, event)
        self._repair()
        self._check_engines()

    def _hear(self, trainer: ChaosTrainer, call: int, event: str) -> None:
        """The end of a publish: in time, with versions that only go up."""
        self._was_whole = False
        limit_s = DEADLINE_S + GRACE_S + SLACK_S
        try:
            answer: dict[str, Any] = trainer.result(call, limit_s + HANGING_S)
        except ChildFailed as error:
            if event != "kill trainer" or error.kind != "gone":
                self.summary.faults.append(f"the trainer broke: {error}")
            self._drop_trainer()
            return
        except DeadlineExceeded:
            trainer.dump_threads()
            self.summary.faults.append(f"publish did not end in {limit_s + HANGING_S:g} s ({event})")
            return
        if event != "stop trainer":
            self.summary.slowest_s = max(self.summary.slowest_s, answer["seconds"])
            if answer["seconds"] > limit_s:
                self.summary.faults.append(f"publish took {answer['seconds']:.1f} s ({event}): {answer['error']}")
        if answer["version"] is None:
            self.summary.failed += 1
            time.sleep(AFTER_FAILURE_S)
            logger.info("failed: %s", answer["error"])
            if not self._troubled:
                self.summary.faults.append(f"an undisturbed round failed: {answer['error']}")
            return
        self.summary.committed += 1
        self._was_whole = len(answer["ok"]) == len(self._urls())
        self.summary.partly += not self._was_whole
        self.summary.last_version = answer["version"]
        number = int(answer["version"].partition("-")[0])
        if number <= self._highest:
            self.summary.faults.append(f"version {number} after {self._highest}")
        self._highest = max(self._highest, number)

    def _check_engines(self) -> None:
        for i, engine in enumerate(self._engines):
            if i in self._stopped_engines:
                continue
            now = engine.call("snapshot", {}, True)
            if not now.dirty:
                self._compare(f"engine {i}", now.version, now.checksums)

    def _compare(self, name: str, version: str, checksums: dict[str, str]) -> None:
        seed = self._reference.seed_of(version)
        if seed is None:
            self.summary.faults.append(f"{name} serves {version}, which nobody published")
            return
        expected = self._reference.checksums(seed)
        wrong = [tensor for tensor, digest in expected.items() if checksums.get(tensor) != digest]
        if wrong:
            self.summary.faults.append(f"{name} says {version}, and {len(wrong)} tensors differ, {wrong[0]} first")

    # -- what strikes

    def _strike_kill_engine(self) -> None:
        self._random.choice(self._engines).kill()

    def _strike_stop_engine(self) -> None:
        i = self._random.randrange(len(self._engines))
        self._engines[i].stop()
        self._stopped_engines.add(i)

    def _before_corrupt_engine(self) -> None:
        self._arm(self._random.choice(["transfer:end", "transfer:end", "feed:middle"]), "corrupt")

    def _before_raise_in_engine(self) -> None:
        point, skip = self._random.choice(
            [("transfer:start", 0), ("transfer:end", 0), ("setup", 0), ("commit:worker", 0), ("commit:worker", 1)]
        )
        self._arm(point, "raise", skip)

    def _arm(self, point: str, action: Action, skip: int = 0) -> None:
        i = self._random.randrange(len(self._engines))
        if i not in self._stopped_engines:
            self._engines[i].arm(point, action, skip=skip)

    def _strike_kill_server(self) -> None:
        self._random.choice(self._servers).kill()

    def _strike_stop_server(self) -> None:
        self._random.choice(self._servers).stop()

    def _strike_kill_trainer(self) -> None:
        assert self._trainer is not None
        self._trainer.kill()

    def _strike_stop_trainer(self) -> None:
        trainer = self._trainer
        assert trainer is not None
        trainer.stop()
        time.sleep(self._random.choice([0.5, 2.5]))
        trainer.go_on()

    def _before_new_trainer(self) -> None:
        """The old one goes without a word; the next one has to find its way by itself."""
        self._drop_trainer()

    # -- what comes back

    def _repair(self) -> None:
        for i, engine in enumerate(self._engines):
            if not engine.alive:  # also one that was stopped before it was killed
                self._stopped_engines.discard(i)
                self._engines[i] = engine.successor()
                engine.close()
                continue
            if i in self._stopped_engines and self._random.random() < 0.7:
                engine.go_on()
                self._stopped_engines.discard(i)
            if i not in self._stopped_engines:
                engine.call("disarm")  # a round that ended early met no fault, and the next one may be undisturbed
        for server in self._servers:
            if server.is_stopped:
                server.go_on()
            elif server.is_dead:
                server.start()

    def _all_up(self) -> bool:
        """Whether nothing is away; one that came back in this very moment may still have to join."""
        return all(server.is_up for server in self._servers) and not self._stopped_engines

    def _urls(self) -> list[str]:
        return [server.url for server in self._servers] + [engine.url for engine in self._engines]

    def _present_trainer(self) -> ChaosTrainer:
        if self._trainer is None or not self._trainer.alive:
            self._drop_trainer()
            self._trainer = ChaosTrainer(
                str(self._checkpoint),
                self._urls(),
                TOKEN,
                **self._a_way_of_bytes(),
                require=self._random.choice(["live", "live", "all"]),
                timeout_s=DEADLINE_S,
                bucket_nbytes=16 * 2**10,
                silence_s=2.0,
                log=str(self._folder / "rounds.jsonl"),
            )
            self._trainer.call("ready", timeout_s=STARTING_S)
            self._troubled = True
        return self._trainer

    def _a_way_of_bytes(self) -> dict[str, Any]:
        """Settings of a trainer; with ``relay`` engines of equal layouts and modes feed each other."""
        if self._random.random() < RELAYED_SHARE:
            return {"transport": "tcp", "relay": [self._urls()]}
        return {"transport": self._random.choice(["shm", "tcp", "auto"]), "delta": self._random.choice([False, True])}

    def _drop_trainer(self) -> None:
        if self._trainer is not None:
            self._trainer.close()
            self._trainer = None

    # -- the end

    def _wait_for_servers(self) -> None:
        end = time.monotonic() + STARTING_S
        while not all(server.is_up for server in self._servers):
            for server in self._servers:
                if server.is_dead:
                    raise RuntimeError(f"{server.name} ended:\n{server.tail()}")
            if time.monotonic() > end:
                raise RuntimeError("the servers did not start")
            time.sleep(0.1)

    def _finish(self, load: Load) -> None:
        """Everybody back, one more round for all, every byte compared, and an answer of every server."""
        if self.summary.faults:
            return
        for i, engine in enumerate(self._engines):
            if i in self._stopped_engines:
                engine.go_on()
        self._stopped_engines.clear()
        self._wait_for_servers()
        self._drop_trainer()
        trainer = self._present_trainer()
        end = time.monotonic() + 60
        while True:
            self._weights_seed += 1
            self._reference.announce(self._weights_seed)
            self.summary.rounds += 1
            answer = trainer.call("publish", self._weights_seed, 10.0, timeout_s=15.0)
            if answer["version"] is not None:
                self.summary.committed += 1
                if len(answer["ok"]) == len(self._urls()):
                    break
                self.summary.partly += 1
            if time.monotonic() > end:
                self.summary.faults.append(f"the fleet did not come together again: {answer}")
                return
            time.sleep(0.2)
        self.summary.last_version = answer["version"]
        for server in self._servers:
            version, checksums = server.checksums()
            if version != answer["version"]:
                self.summary.faults.append(f"{server.name} serves {version}, not {answer['version']}")
            self._compare(server.name, version, checksums)
        for i, engine in enumerate(self._engines):
            now = engine.call("snapshot", {}, True)
            if (now.version, now.dirty, now.paused) != (answer["version"], False, False):
                self.summary.faults.append(f"engine {i} is {now}, not at {answer['version']}")
            self._compare(f"engine {i}", now.version, now.checksums)
        for server in self._servers:
            self._hear_from(server, answer["version"], load)

    def _hear_from(self, server: Server, version: str, load: Load) -> None:
        """A server that looks well and never answers again is a fault, too."""
        end = time.monotonic() + ANSWERING_S
        with new_client() as client:
            while time.monotonic() < end:
                answer, fault = ask(server, client, self._random)
                if fault is not None:
                    self.summary.faults.append(fault)
                if answer is not None:
                    load.check(answer)
                    if {span[0] for span in answer.spans} != {version}:
                        self.summary.faults.append(f"{server.name} answered with {answer.spans}, not {version}")
                    return
                time.sleep(0.1)
        self.summary.faults.append(f"{server.name} did not answer within {ANSWERING_S:g} s")

    def _close(self) -> None:
        self._drop_trainer()
        for engine in self._engines:
            engine.close()
        for server in self._servers:
            server.close()
