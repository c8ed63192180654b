"""The cells: each fault as a function of a transport and a mode, which plays it through and says in words what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, PlanMismatch, ShadowError, StateError, WeightcastError
from weightcast.report.roundlog import RoundLog
from weightcast.testing.engine_process import SHAPES, SLICE_NBYTES, TOKEN, EngineProcess
from weightcast.testing.faults import Action, MessageTrouble, MessyChannel
from weightcast.testing.matrix.field import DEADLINE_S, Failure, Field, expect, forget_frames, jumped_clock
from weightcast.testing.network import Cable, obstacle
from weightcast.trainer.clients import HttpEngineClient
from weightcast.trainer.clients.base import AnswerLost, CommitOrder, CommitReply

Play = Callable[..., str]
CPU_TRANSPORTS = ("shm", "gloo")
GPU_TRANSPORTS = ("cuda_ipc", "nccl")
BOTH, STAGED = ("staged", "in_place"), ("staged",)
DAY_S = 86400.0


@dataclass(frozen=True, slots=True)
class Cell:
    """One fault under one transport and mode."""

    fault: str
    transport: str
    mode: str
    play: Play
    needs_network: bool = False

    @property
    def id(self) -> str:
        return f"{self.fault}-{self.transport}-{self.mode}".replace(" ", "_")

    @property
    def needs_gpu(self) -> bool:
        return self.transport in GPU_TRANSPORTS

    def run(self) -> str:
        """Play it through; returns the outcome in words, raises AssertionError for a broken promise."""
        return self.play(partial(Field, self.transport, self.mode, device="cuda" if self.needs_gpu else "cpu"))


MakeField = Callable[..., Field]


# -- the trainer dies


def trainer_killed(make: MakeField, *, point: str | None) -> str:
    with make() as field:
        trainer = field.start_trainer()
        if point is not None:
            field.a.arm(point, "sleep", 0.5)
            before = field.a.call("reached", point)
            trainer.start("publish", field._next_seed(2))
            field.a.wait_for(point, before)
        trainer.kill()
        time.sleep(0.7 if point else 0.1)
        if point is not None and point.startswith("commit"):
            field.consistent(field.a, field.b)
        else:
            field.steady(field.a, field.b, number=1)
        serving = {str(engine.call("state")[0]) for engine in (field.a, field.b)}
        field.start(publish=False).connect(DEADLINE_S)
        numbers = [int(version.partition("-")[0]) for version in serving if version != "default"]
        report = field.succeed()
        expect(report.number > max(numbers), f"version {report.number} after {serving}")
        field.heal()
        return "the engines go on with what they served; the next trainer joins at once"


def trainer_stopped(make: MakeField) -> str:
    with make(silence_s=1.0) as field:
        trainer = field.start_trainer(timeout_s=DEADLINE_S)
        field.a.arm("transfer:middle", "sleep", 0.5)
        before = field.a.call("reached", "transfer:middle")
        call = trainer.start("publish", field._next_seed(2))
        field.a.wait_for("transfer:middle", before)
        trainer.stop()
        time.sleep(2.0)
        field.steady(field.a, field.b, number=1)
        trainer.go_on()
        answer = trainer.result(call, DEADLINE_S + 2)
        expect(answer["errors"], f"published after it was lost: {answer}")
        for _ in range(2):
            answer = trainer.call("publish", field._next_seed(int(max(field.seeds)) + 1))
            if answer["version"]:
                break
        expect(answer["version"], f"the next rounds failed: {answer}")
        number = int(answer["version"].partition("-")[0])
        field.seeds[number] = field._seed
        field.consistent(field.a, field.b)
        return "the engines leave it after its silence; continued, it is told and joins again"


# -- an engine dies, stops, stumbles


def engine_killed(make: MakeField, *, point: str) -> str:
    with make() as field:
        field.start()
        if point == "setup":
            _set_up_again(field)
        field.a.arm(point, "kill")
        failure = field.fail()
        expect(not field.a.alive, "the fault did not strike")
        expect(field.a.url in failure.causes, f"{failure.error} does not name the engine")
        field.steady(field.b)
        field.told_truly(failure, field.b)
        field.replace()
        field.heal()
        return failure.summary


def engine_killed_while_joining(make: MakeField) -> str:
    with make() as field:
        field.start([field.b.url], publish=False)
        field.succeed(engines=[field.b])
        assert field.publisher is not None
        field.a.arm("join", "kill")
        error = _add(field, field.a.url)
        field.steady(field.b, number=max(field.seeds))
        field.replace()
        field.publisher.add(field.a.url)
        field.heal()
        return f"{type(error).__name__}; the fleet is as before"


def engine_stopped(make: MakeField, *, point: str) -> str:
    with make() as field:
        field.start()
        if point == "setup":
            _set_up_again(field)
        field.a.arm(point, "stop")
        failure = field.fail()
        expect(field.a.url in failure.causes, f"{failure.error} does not name the engine")
        field.steady(field.b)
        field.told_truly(failure, field.b)
        field.a.go_on()
        time.sleep(0.5)
        field.consistent(field.a)
        if not point.startswith("commit"):
            field.steady(field.a)
        field.heal()
        return failure.summary


def transfer_raises(make: MakeField) -> str:
    with make() as field:
        field.start()
        field.a.arm("transfer:middle", "raise")
        failure = field.fail()
        expect(failure.causes.get(field.a.url) in ("TransportError", "LoadError"), f"{failure.error}")
        _steady_after(field, failure)
        return failure.summary


def loader_raises(make: MakeField) -> str:
    with make(loader=True) as field:
        field.start()
        field.a.arm("loader", "raise")
        failure = field.fail()
        expect(failure.causes.get(field.a.url) == "LoadError", f"{failure.error}")
        _steady_after(field, failure)
        return failure.summary


def no_memory_for_the_shadow(make: MakeField) -> str:
    with make() as field:
        field.a.arm("shadow", "no memory")
        try:
            field.start(publish=False).connect(DEADLINE_S)
        except ShadowError as error:
            expect(error.engine == field.a.url, f"{error} names another engine")
        else:
            raise AssertionError("connected without a shadow")
        field.steady(field.a, field.b, number=0)
        field.heal()
        return "ShadowError names the engine; nothing changed"


def never_joins(make: MakeField) -> str:
    class Mute(HttpEngineClient):
        """Its workers never say hello."""

        def init(self, init_info: Mapping[str, Any], deadline: Deadline) -> None:
            return

    with make() as field:
        mute = Mute(field.a.url, token=TOKEN)
        start = time.monotonic()
        try:
            field.start([mute, field.b.url], publish=False).connect(DEADLINE_S)
        except DeadlineExceeded as error:
            expect(error.engine == field.a.url and error.phase == "join", f"{error} does not say who and when")
        else:
            raise AssertionError("connected without workers")
        seconds = time.monotonic() - start
        expect(seconds < DEADLINE_S + 2, f"it took {seconds:.1f} s")
        field.steady(field.a, field.b, number=0)
        assert field.publisher is not None
        field.publisher.remove(field.a.url)
        field.publisher.add(field.a.url)
        field.heal()
        return f"DeadlineExceeded after {seconds:.1f} s"


def slow_engine(make: MakeField) -> str:
    with make() as field:
        field.start()
        field.a.arm("transfer:middle", "sleep", DEADLINE_S + 0.7)
        failure = field.fail()
        expect(failure.causes.get(field.a.url) == "DeadlineExceeded", f"{failure.error}")
        field.steady(field.b)
        time.sleep(1.0)
        field.steady(field.a)
        field.heal()
        return failure.summary


def manifests_disagree(make: MakeField) -> str:
    with make() as field:
        missing = field.tensors.pop(next(iter(SHAPES)))
        try:
            field.start(publish=False).connect(DEADLINE_S)
        except WeightcastError as error:
            causes = getattr(error, "causes", {"": error}).values()
            expect(all(isinstance(cause, PlanMismatch) for cause in causes), f"{error}")
        else:
            raise AssertionError("connected with another model")
        field.steady(field.a, field.b, number=0)
        field.stop()
        field.tensors[next(iter(SHAPES))] = missing
        field.tensors = {name: field.tensors[name] for name in SHAPES}
        field.start()
        field.heal()
        return "PlanMismatch names the tensor; nothing changed"


def tensor_larger_than_a_bucket(make: MakeField) -> str:
    with make() as field:
        largest = max(tensor.nbytes for tensor in field.tensors.values())
        expect(largest > 4 * SLICE_NBYTES, "no tensor is larger than a bucket")
        field.start()
        field.heal()
        return "published, in pieces"


def corrupted_bytes(make: MakeField) -> str:
    with make() as field:
        field.start()
        field.a.arm("transfer:end", "corrupt")
        failure = field.fail()
        expect(failure.causes.get(field.a.url) == "DigestMismatch", f"{failure.error}")
        _steady_after(field, failure)
        return failure.summary


# -- messages


def messages(make: MakeField, *, trouble: MessageTrouble) -> str:
    with make() as field:
        field.start()
        field.a.call("messy", trouble)
        outcomes = []
        with MessyChannel(trouble):
            for _ in range(3):
                try:
                    field.succeed(DEADLINE_S)
                    outcomes.append("published")
                except WeightcastError as error:
                    expect(trouble == "reorder", f"{trouble} messages broke a round: {error}")
                    field.steady(field.b)
                    field.consistent(field.a)
                    outcomes.append("aborted")
        field.a.call("messy", None)
        field.heal()
        return ", ".join(sorted(set(outcomes)))


class _Lossy(HttpEngineClient):
    """Loses orders to commit, or the answers to them."""

    orders, answers = 0, 0

    def commit(self, order: CommitOrder, deadline: Deadline) -> CommitReply:
        if self.orders:
            self.orders -= 1
            raise AnswerLost("injected: the order was lost", engine=self.name)
        reply = super().commit(order, deadline)
        if self.answers:
            self.answers -= 1
            raise AnswerLost("injected: the answer was lost", engine=self.name)
        return reply


def commit_lost(make: MakeField, *, orders: int = 0, answers: int = 0) -> str:
    with make() as field:
        lossy = _Lossy(field.a.url, token=TOKEN)
        field.start([lossy, field.b.url])
        lossy.orders, lossy.answers = orders, answers
        if max(orders, answers) < 3:
            field.succeed(DEADLINE_S)
            return "repeated and published"
        failure = field.fail()
        expect(failure.causes.get(field.a.url) == "AnswerLost", f"{failure.error}")
        lossy.orders = lossy.answers = 0
        field.steady(field.a, field.b)
        field.told_truly(failure, field.a, field.b)
        field.heal()
        return failure.summary


def late_answer(make: MakeField) -> str:
    with make() as field:
        field.start()
        field.a.arm("answer", "sleep", 0.0)
        field.a.arm("commit:end", "sleep", DEADLINE_S + 0.4)
        failure = field.fail()
        expect(failure.causes.get(field.a.url) == "DeadlineExceeded", f"{failure.error}")
        time.sleep(1.0)
        field.steady(field.a, field.b)
        field.heal()
        return failure.summary


def http_server_dies(make: MakeField) -> str:
    with make() as field:
        field.start()
        field.a.call("hang_up")
        failure = field.fail()
        expect(failure.causes.get(field.a.url) == "PeerLost", f"{failure.error}")
        field.steady(field.a, field.b)
        field.told_truly(failure, field.a, field.b)
        field.a.kill()
        field.replace()
        field.heal()
        return failure.summary


# -- networks


def network_cut(make: MakeField, *, point: str) -> str:
    with Cable() as cable, make(host=cable.there, address=cable.here, netns=cable.netns) as field:
        field.start()
        field.a.arm(point, "sleep", 1.0)
        before = field.a.call("reached", point)

        def cut() -> None:
            field.a.wait_for(point, before)
            cable.pull()

        failure = _fail_while(field, cut)
        expect(field.a.url in failure.causes, f"{failure.error} does not name the engine")
        field.steady(field.b)
        field.consistent(field.a)
        cable.plug_in()
        time.sleep(1.5)
        field.consistent(field.a)
        if not point.startswith("commit"):
            field.steady(field.a)
        field.heal()
        return failure.summary


# -- trainers, disks, clocks


def second_trainer_is_refused(make: MakeField) -> str:
    with make() as field:
        field.start()
        with field.second() as second:
            try:
                second.connect(DEADLINE_S)
            except WeightcastError as error:
                causes = getattr(error, "causes", {"": error}).values()
                expect(all(isinstance(cause, StateError) for cause in causes), f"{error}")
            else:
                raise AssertionError("a second trainer got in")
        del second
        field.steady(field.a, field.b, number=max(field.seeds))
        field.heal()
        return "StateError; the first one goes on"


def second_trainer_takes_over(make: MakeField) -> str:
    with make() as field:
        field.start()
        with field.second(takeover=True) as second:
            number = second.publish(DEADLINE_S).number
            expect(number == 2, f"the second trainer published {number}")
            seed = field._seed
            failure = field.fail()
            expect(set(failure.causes.values()) <= {"StateError", "PeerLost"}, f"{failure.error}")
            field.seeds[number] = seed
            field.consistent(field.a, field.b)
        del second
        report = field.succeed()
        expect(report.number == 3, f"then the first one published {report.number}")
        field.heal()
        return f"versions go on; the first one gets {failure.summary}"


def disk_full(make: MakeField) -> str:
    with make() as field:
        field.start()
        log = RoundLog("/dev/full")
        report = field.succeed()
        expect(not log.append(report), "the disk was not full")
        field.heal()
        return "published; a warning"


def clock_jumps(make: MakeField) -> str:
    with make() as field:
        field.start()
        for seconds in (DAY_S, -2 * DAY_S):
            field.a.call("jump_clock", seconds)
            with jumped_clock(-seconds):
                field.succeed(DEADLINE_S)
        return "published"


# -- require="live"


def live_without(make: MakeField, *, point: str, action: Action) -> str:
    with make(require="live") as field:
        field.start()
        field.a.arm(point, action)
        start = time.monotonic()
        report = field.succeed(DEADLINE_S, engines=[field.b])
        seconds = time.monotonic() - start
        expect(seconds < DEADLINE_S + 2, f"it took {seconds:.1f} s")
        mine = next(engine for engine in report.engines if engine.name == field.a.url)
        expect(not mine.ok and mine.error, "the report does not name the engine")
        expect(not report.ok, "the report says ok")
        if action == "kill":
            field.succeed(DEADLINE_S, engines=[field.b])
            field.replace()
        elif action == "stop":
            field.succeed(DEADLINE_S, engines=[field.b])
            field.a.go_on()
            time.sleep(0.3)
        field.consistent(field.a)
        _comes_back(field)
        field.heal()
        return f"the others publish in {seconds:.1f} s; it comes back by itself"


def _comes_back(field: Field) -> None:
    assert field.publisher is not None
    end = time.monotonic() + 10
    while True:
        report = field.succeed(engines=[field.b])
        if report.ok:
            return
        expect(time.monotonic() < end, f"it did not come back: {report.engines}")


# -- pieces


def _set_up_again(field: Field) -> None:
    """Leave the pair of the victim in need of a new set-up."""
    field.a.arm("transfer:start", "raise")
    field.fail()
    field.seeds.pop(max(field.seeds), None)


def _add(field: Field, url: str) -> WeightcastError:
    assert field.publisher is not None
    try:
        field.publisher.add(url, DEADLINE_S)
    except WeightcastError as error:
        forget_frames(error)
        return error
    raise AssertionError("it was added")


def _steady_after(field: Field, failure: Failure) -> None:
    field.steady(field.a, field.b)
    field.told_truly(failure, field.a, field.b)
    field.heal()


def _fail_while(field: Field, do: Callable[[], None]) -> Failure:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        failing = pool.submit(field.fail)
        do()
        return failing.result()


KILL_POINTS = ("setup", "transfer:start", "transfer:middle", "transfer:end", "commit:start", "commit:end", "answer")
STOP_POINTS = ("setup", "transfer:middle", "transfer:end", "commit:start", "commit:end")

FAULTS: dict[str, tuple[Play, tuple[str, ...]]] = {
    "trainer killed before a transfer": (partial(trainer_killed, point=None), STAGED),
    "trainer killed in a transfer": (partial(trainer_killed, point="transfer:middle"), BOTH),
    "trainer killed after a transfer": (partial(trainer_killed, point="transfer:end"), STAGED),
    "trainer killed in the commit": (partial(trainer_killed, point="commit:start"), BOTH),
    "trainer stopped in a transfer": (trainer_stopped, STAGED),
    "engine killed while joining": (engine_killed_while_joining, STAGED),
    **{
        f"engine killed at {point}": (
            partial(engine_killed, point=point),
            BOTH if point in ("transfer:middle", "commit:end") else STAGED,
        )
        for point in KILL_POINTS
    },
    **{
        f"engine stopped at {point}": (
            partial(engine_stopped, point=point),
            BOTH if point in ("transfer:middle", "commit:start") else STAGED,
        )
        for point in STOP_POINTS
    },
    "receiving raises": (transfer_raises, BOTH),
    "the engine's loader raises": (loader_raises, BOTH),
    "no memory for the shadow": (no_memory_for_the_shadow, STAGED),
    "a worker never joins": (never_joins, STAGED),
    "engine slower than the deadline": (slow_engine, BOTH),
    "manifests disagree": (manifests_disagree, STAGED),
    "tensor larger than a bucket": (tensor_larger_than_a_bucket, BOTH),
    "corrupted bytes": (corrupted_bytes, BOTH),
    "messages twice": (partial(messages, trouble="duplicate"), BOTH),
    "messages late": (partial(messages, trouble="late"), STAGED),
    "messages out of order": (partial(messages, trouble="reorder"), STAGED),
    "order to commit lost": (partial(commit_lost, orders=1), BOTH),
    "answer to the commit lost": (partial(commit_lost, answers=1), BOTH),
    "order to commit never arrives": (partial(commit_lost, orders=1000), STAGED),
    "answer to the commit never arrives": (partial(commit_lost, answers=1000), STAGED),
    "commit ends after the deadline": (late_answer, STAGED),
    "HTTP server dies": (http_server_dies, STAGED),
    "network cut in a transfer": (partial(network_cut, point="transfer:middle"), BOTH),
    "network cut before the commit": (partial(network_cut, point="transfer:end"), STAGED),
    "network cut in the commit": (partial(network_cut, point="commit:start"), STAGED),
    "a second trainer": (second_trainer_is_refused, STAGED),
    "a second trainer takes over": (second_trainer_takes_over, STAGED),
    "disk full": (disk_full, STAGED),
    "clock jumps": (clock_jumps, STAGED),
    "live: engine killed in a transfer": (partial(live_without, point="transfer:middle", action="kill"), BOTH),
    "live: engine stopped in a transfer": (partial(live_without, point="transfer:middle", action="stop"), BOTH),
    "live: corrupted bytes": (partial(live_without, point="transfer:end", action="corrupt"), BOTH),
    "live: engine killed in the commit": (partial(live_without, point="commit:start", action="kill"), STAGED),
}


def cells(transports: tuple[str, ...] = CPU_TRANSPORTS + GPU_TRANSPORTS) -> list[Cell]:
    """All cells, fault by fault."""
    return [
        Cell(fault, transport, mode, play, needs_network=fault.startswith("network"))
        for fault, (play, modes) in FAULTS.items()
        for transport in transports
        for mode in modes
    ]


def network_obstacle() -> str | None:
    """Why the network's cells cannot be played here."""
    return obstacle()


__all__ = ["Cell", "EngineProcess", "cells", "network_obstacle"]
