"""Engines that feed each other: every live byte is the trainer's, the trainer sends once, and a relay that fails costs nobody the round."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from weightcast import Publisher
from weightcast.deadline import Deadline
from weightcast.errors import InvalidInput, RoundFailed
from weightcast.manifest.dtypes import name_of
from weightcast.report.model import Report
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.testing.peer_engine import PeerEngine
from weightcast.trainer.fleet.feeding import Feeding
from weightcast.trainer.ranks import all_ranks
from weightcast.transports import relays
from weightcast.transports.connection import Connection
from weightcast.transports.edges import Feeder, Landed, Source
from weightcast.transports.movers import HostMover
from weightcast.transports.relays import RelayedWorkerEnd
from weightcast.transports.spans import Loading

Tensors = dict[str, torch.Tensor]
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.int8, torch.int64)
BUCKET_NBYTES = 2**14
PATIENCE_S = 100.0
"""Longer than a test, however busy the machine: no neighbour counts as silent."""

BRIEF_SHARE = 2.0 / (5 * PATIENCE_S)
"""Of a round's time: two seconds."""


def fresh(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Any bits, those of NaN with all their payloads too."""
    raw = np.random.default_rng().integers(0, 256, math.prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(raw).view(dtype).reshape(shape)


def weights() -> Tensors:
    found = {f"t{number}": fresh(dtype, 48, 25) for number, dtype in enumerate(DTYPES)}
    return found | {"wide": fresh(torch.bfloat16, 400, 128), "long": fresh(torch.float32, 4000, 12)}


def step(source: Tensors) -> None:
    for value in source.values():
        value.copy_(fresh(value.dtype, *value.shape))


@pytest.fixture
def make() -> Iterator[Callable[..., list[LocalEngine]]]:
    made: list[LocalEngine] = []

    def new(count: int, *, mode: str = "staged", shards: int = 1, **options: Any) -> list[LocalEngine]:
        for number in range(count):
            models = [DictModel(weights(), rows=(rank, shards), **options) for rank in range(shards)]
            made.append(LocalEngine(f"e{number}", models, mode=mode, side_by_side=True))
        return made

    yield new
    for engine in made:
        engine.stop()


def publisher_of(source: Tensors, engines: Sequence[LocalEngine], **settings: Any) -> Publisher:
    settings = {"relay": [[engine.name for engine in engines]], "transport": "tcp"} | settings
    settings = {"silence_s": PATIENCE_S, "timeout_s": 5 * PATIENCE_S, "bucket_nbytes": BUCKET_NBYTES} | settings
    return Publisher(source, engines, **settings)


def sent(report: Report) -> list[int]:
    """What the trainer sent to each worker, in the order of engines."""
    assert report.digests_match
    return [worker.sent_nbytes for engine in report.engines for worker in engine.workers]


SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "staged": ({}, {}),
    "exchanged": ({"relocatable": False}, {}),
    "in place": ({"mode": "in_place"}, {}),
    "two shards": ({"shards": 2}, {}),
    "two shards in place": ({"shards": 2, "mode": "in_place"}, {}),
    "through the loader": ({"through_loader": ("wide", "t1")}, {}),
    "tls": ({}, {"transport": "tls"}),
    "one engine must not stop the others": ({}, {"require": "live"}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_trainer_sends_once_and_every_engine_has_every_byte(
    shape: str, make: Callable[..., list[LocalEngine]]
) -> None:
    options, settings = SHAPES[shape]
    engines, source = make(4, **options), weights()
    shards = options.get("shards", 1)
    with publisher_of(source, engines, **settings) as publisher:
        for _ in range(4):
            step(source)
            report = publisher.publish()
            assert all(model.holds(source) for engine in engines for model in engine.models)
            first, rest = sent(report)[:shards], sent(report)[shards:]
            assert all(first), report
            assert not any(rest), report


@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_weights_that_no_socket_reaches_are_fed_on_through_buffers(
    mode: str, make: Callable[..., list[LocalEngine]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU."""
    monkeypatch.setattr(HostMover, "reaches_weights", False)
    engines, source = make(3, mode=mode), weights()
    with publisher_of(source, engines) as publisher:
        for _ in range(3):
            step(source)
            first, *rest = sent(publisher.publish())
            assert all(engine.models[0].holds(source) for engine in engines)
            assert first
            assert not any(rest)


def test_a_stream_is_fed_on_window_by_window(make: Callable[..., list[LocalEngine]]) -> None:
    engines, source = make(3), weights()
    with publisher_of(lambda: iter(source.items()), engines) as publisher:  # type: ignore[arg-type]
        for _ in range(3):
            step(source)
            report = publisher.publish()
            assert all(engine.models[0].holds(source) for engine in engines)
            first, *rest = sent(report)
            assert first
            assert not any(rest)


def test_engines_come_and_go(make: Callable[..., list[LocalEngine]]) -> None:
    """An engine that is added gets its first round alone, and has its place in the chain from the next one on."""
    engines, source = make(4), weights()
    names = [[engine.name for engine in engines]]
    with publisher_of(source, engines[:2], relay=names) as publisher:
        publisher.publish()
        for engine in engines[2:]:
            publisher.add(engine)
        for present, leaves in ((engines, None), (engines[1:], "e0"), (engines[1:3], "e3")):
            if leaves:
                publisher.remove(leaves)
            step(source)
            first, *rest = sent(publisher.publish())
            assert all(engine.models[0].holds(source) for engine in present)
            assert first
            assert not any(rest)


def test_workers_that_cast_and_workers_that_lay_out_otherwise_get_everything_from_the_trainer() -> None:
    source = {"a": torch.randn(300, 70).to(torch.bfloat16), "b": torch.randn(40)}
    wide = {name: value.float() for name, value in source.items()}
    models = [DictModel(some) for some in (wide, wide, source, source)] + [DictModel(source, rows=(0, 2))]
    engines = [LocalEngine(f"w{number}", [model], mode="staged") for number, model in enumerate(models[:4])]
    engines.append(LocalEngine("w4", [models[4], DictModel(source, rows=(1, 2))], mode="staged"))
    try:
        with publisher_of(source, engines) as publisher:
            for _ in range(2):
                for value in source.values():
                    value.copy_(torch.randn(value.shape))
                report = publisher.publish()
                assert all(model.holds(source) for engine in engines for model in engine.models)
                assert [bool(nbytes) for nbytes in sent(report)] == [True, True, True, False, True, True]
                fed = [worker.reason for engine in report.engines for worker in engine.workers]
                assert ["fed by" in reason for reason in fed] == [False, False, False, True, False, False]
                assert ["values are cast" in reason for reason in fed] == [True, True, False, False, False, False]
                assert ["nobody else of its site" in reason for reason in fed] == [False] * 4 + [True] * 2
    finally:
        for engine in engines:
            engine.stop()


FAR, SLOW_S, QUICK_S = ("10.1.1.1", "10.1.2.1", "10.1.1.2", "2001:db8::1", "10.1.1.3"), 8.0, 1.0


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[bool, float]:
    """Seconds that rounds of a site are said to take, by whether its engines feed each other."""
    took, note = {False: SLOW_S, True: QUICK_S}, Feeding.note

    def noting(feeding: Feeding, nbytes: int, seconds: float) -> None:
        assert nbytes > 0
        assert seconds > 0
        note(feeding, nbytes, took[feeding.is_on])

    monkeypatch.setattr(Feeding, "note", noting)
    return took


@pytest.fixture
def far(make: Callable[..., list[LocalEngine]], monkeypatch: pytest.MonkeyPatch) -> list[LocalEngine]:
    """Engines of a network far away, the second and fourth one of other networks."""
    engines, real = make(len(FAR)), all_ranks.local_facts
    for engine, host in zip(engines, FAR, strict=True):
        engine.host = host
    elsewhere = lambda *args, **more: msgspec.structs.replace(real(*args, **more), host="another")  # noqa: E731
    monkeypatch.setattr(all_ranks, "local_facts", elsewhere)
    return engines


def test_auto_has_engines_of_a_far_network_feed_each_other_where_that_is_faster(
    far: list[LocalEngine], times: dict[bool, float]
) -> None:
    """First the trainer sends to all, then relays are tried, and what took less time goes on, until that changes."""
    source, all_of_them, fed = weights(), [True] * 5, [True, True, False, True, False]
    with publisher_of(source, far, relay="auto", address="127.0.0.1") as publisher:
        said = []

        def round_() -> list[bool]:
            step(source)
            report = publisher.publish()
            assert all(engine.models[0].holds(source) for engine in far)
            said[:] = [engine.workers[0].reason for engine in report.engines]
            return [bool(nbytes) for nbytes in sent(report)]

        assert [round_() for _ in range(5)] == [all_of_them, all_of_them, fed, fed, fed]
        assert ["fed by e2 worker 0" in each for each in said] == [False] * 4 + [True]
        assert ["the trainer takes 8 s" in each for each in said] == [True, False, True, False, True]
        times[True] = 2 * SLOW_S
        assert [round_() for _ in range(4)] == [fed, fed, all_of_them, all_of_them]
        assert not any("fed by" in each for each in said)
        assert "relays 16 s" in said[0]


def test_auto_leaves_alone_engines_on_the_trainers_machine(make: Callable[..., list[LocalEngine]]) -> None:
    engines, source = make(3), weights()
    for engine, host in zip(engines, ("10.1.1.1", "10.1.1.2", "127.0.0.1"), strict=True):
        engine.host = host
    with publisher_of(source, engines, relay="auto", address="127.0.0.1") as publisher:
        for _ in range(4):
            step(source)
            report = publisher.publish()
            assert all(sent(report))
            assert not any("relays" in engine.workers[0].reason for engine in report.engines)


@pytest.mark.parametrize("relay", [True, "all", ["e0"], [["e0", 1]], [["e0"], ["e0"]], None, 3, {"e0": ["e1"]}])
def test_what_names_no_sites_is_refused(relay: Any) -> None:
    with pytest.raises(InvalidInput, match="relay"):
        Publisher(weights(), relay=relay)


def test_relay_and_delta_are_refused_together() -> None:
    with pytest.raises(InvalidInput, match="Leave one of the two out"):
        Publisher(weights(), relay="auto", delta=True)


# -- relays that fail


@pytest.fixture
def when_fed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[RelayedWorkerEnd], None]], None]:
    """Has a call made once, in the middle of a round: before a worker in this process takes the fourth bucket that it is fed. Until
    then relays in this process feed six buckets and no more, so that what is to come is not on its way already."""

    def install(call: Callable[[RelayedWorkerEnd], None]) -> None:
        take, wait, left, was_made = RelayedWorkerEnd._take, Landed.wait, [4], threading.Event()

        def counting(end: RelayedWorkerEnd, *args: Any) -> None:
            if end._source is not None and not end._source.is_given_up:
                left[0] -= 1
                if not left[0]:
                    call(end)
                    was_made.set()
            take(end, *args)

        def holding(landed: Landed, bucket: int, timeout_s: float) -> bool:
            return (bucket < 6 or was_made.wait(timeout_s)) and wait(landed, bucket, timeout_s)

        monkeypatch.setattr(RelayedWorkerEnd, "_take", counting)
        monkeypatch.setattr(Landed, "wait", holding)

    return install


@pytest.fixture
def peer() -> Iterator[PeerEngine]:
    """An engine in a process of its own, which is not built yet."""
    with PeerEngine("relay") as engine:
        yield engine


def shapes() -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (tuple(value.shape), name_of(value.dtype)) for name, value in weights().items()}


FAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "killed": ("kill", {"silence_s": PATIENCE_S}),
    "stopped": ("freeze", {"silence_s": 6.0}),
}


@pytest.mark.parametrize(
    ("require", "mode", "fault"),
    [
        ("live", "staged", "killed"),
        ("live", "in_place", "killed"),
        ("all", "staged", "killed"),
        ("live", "staged", "stopped"),
    ],
)
def test_a_relay_that_is_killed_or_stopped_in_the_middle(
    require: str,
    mode: str,
    fault: str,
    make: Callable[..., list[LocalEngine]],
    peer: PeerEngine,
    when_fed: Callable[[Callable[[RelayedWorkerEnd], None]], None],
) -> None:
    """The workers after it get the rest from the trainer. Where each engine has to reach the version, none does."""
    first, last = make(2, mode=mode)
    chain = [first, peer.build(shapes(), mode=mode), last]
    source = weights()
    name, settings = FAULTS[fault]
    with publisher_of(source, chain, require=require, **settings) as publisher:  # type: ignore[arg-type]
        assert not any(sent(publisher.publish())[1:])
        before = {key: value.clone() for key, value in source.items()}
        step(source)
        when_fed(lambda end: getattr(peer.peer, name)())
        if require == "live":
            report = publisher.publish()
            outcomes = {engine.name: engine for engine in report.engines}
            assert [outcomes[engine.name].ok for engine in chain] == [True, False, True]
            # To the last one, or, where a busy machine kept the first one's bytes from coming in time, to the one that then failed.
            assert any(outcomes[name].workers[0].sent_nbytes for name in (last.name, peer.name))
            assert first.models[0].holds(source)
            assert last.models[0].holds(source)
        else:
            with pytest.raises(RoundFailed) as failure:
                publisher.publish()
            assert set(failure.value.causes) == {peer.name}
            assert first.models[0].holds(before)
            assert last.models[0].holds(before)
        peer.peer.kill()
        publisher.remove(peer.name)
        step(source)
        nbytes, fed = sent(publisher.publish())
        assert nbytes
        assert not fed
        assert first.models[0].holds(source)
        assert last.models[0].holds(source)


@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_a_worker_that_does_not_come_to_be_fed_is_given_up(
    mode: str, make: Callable[..., list[LocalEngine]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker before it goes on without it, and it gets everything from the trainer when it comes."""
    engines, source = make(3, mode=mode), weights()
    connected, give_up, given_up = Source.connected, Feeder.give_up, threading.Event()
    late: list[Source] = []

    def coming_late(one: Source, place: bytes, deadline: Deadline) -> Connection:
        if not late:
            late.append(one)
            assert given_up.wait(PATIENCE_S)
        return connected(one, place, deadline)

    def giving_up(feeder: Feeder) -> None:
        give_up(feeder)
        given_up.set()

    monkeypatch.setattr(relays, "PATIENT_SHARE", BRIEF_SHARE)
    monkeypatch.setattr(Source, "connected", coming_late)
    monkeypatch.setattr(Feeder, "give_up", giving_up)
    with publisher_of(source, engines) as publisher:
        for _ in range(3):
            step(source)
            assert any(sent(publisher.publish())[1:])
            assert all(engine.models[0].holds(source) for engine in engines)
        assert late[0].is_given_up


@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_a_relay_that_falls_silent_costs_only_bytes(
    mode: str, make: Callable[..., list[LocalEngine]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As behind a link that was cut: nothing comes, and no connection closes. Every engine reaches the version."""
    engines, source = make(3, mode=mode), weights()
    feed, give_up, gone = Feeder.feed, Source.give_up, threading.Event()
    muted: list[Feeder] = []

    class Mute(Landed):
        def __init__(self, landed: Landed) -> None:
            self.landed = landed

        def wait(self, bucket: int, timeout_s: float) -> bool:
            if bucket == 5:
                gone.wait(PATIENCE_S)
            return self.landed.wait(bucket, timeout_s)

    def feeding(feeder: Feeder, loadings: Any, sizes: Any, landed: Landed, *args: Any) -> None:
        if gone.is_set() or muted not in ([], [feeder]):
            return feed(feeder, loadings, sizes, landed, *args)
        muted[:] = [feeder]
        return feed(feeder, loadings, sizes, Mute(landed), *args)

    def giving_up(source: Source) -> None:
        gone.set()
        give_up(source)

    monkeypatch.setattr(relays, "PATIENT_SHARE", BRIEF_SHARE)
    with publisher_of(source, engines) as publisher:
        publisher.publish()
        monkeypatch.setattr(Feeder, "feed", feeding)
        monkeypatch.setattr(Source, "give_up", giving_up)
        for _ in range(3):
            step(source)
            assert any(sent(publisher.publish())[1:])
            assert all(engine.models[0].holds(source) for engine in engines)


class Lying:
    """Zeros in place of a bucket."""

    def __init__(self, honest: Loading) -> None:
        self.run, self.spans = honest.run, [bytes(len(span)) for span in honest.spans]


@pytest.mark.parametrize("lie", ["other bytes", "another number"])
def test_a_relay_that_lies_makes_nothing_live(
    lie: str, make: Callable[..., list[LocalEngine]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong bytes end the round for all, after which those that had to do with them are in no chain any more. One that counts otherwise
    is not listened to."""
    engines, source = make(3), weights()
    feed = Feeder.feed

    def lying(feeder: Feeder, loadings: Any, sizes: Any, landed: Landed, first: int, *args: Any) -> None:
        if lie == "other bytes":
            loadings = [*loadings[:-1], Lying(loadings[-1])]
        feed(feeder, loadings, sizes, landed, first + (lie == "another number"), *args)

    with publisher_of(source, engines) as publisher:
        publisher.publish()
        before = {name: value.clone() for name, value in source.items()}
        step(source)
        with monkeypatch.context() as patched:
            patched.setattr(Feeder, "feed", lying)
            if lie == "other bytes":
                with pytest.raises(RoundFailed, match="digest"):
                    publisher.publish()
                assert all(engine.models[0].holds(before) for engine in engines)
            report = publisher.publish()
            assert all(sent(report))
            assert all(engine.models[0].holds(source) for engine in engines)
        reasons = [engine.workers[0].reason for engine in report.engines]
        told = "no relay any more, as e1 worker 0 got wrong bytes from e0 worker 0"
        assert [told in reason for reason in reasons] == [lie == "other bytes"] * 2 + [False]


def test_those_who_only_got_what_was_wrong_already_go_on_feeding_each_other(
    make: Callable[..., list[LocalEngine]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engines, source = make(4), weights()
    feed = Feeder.feed

    def lying(feeder: Feeder, loadings: Any, *args: Any) -> None:
        feed(feeder, [*loadings[:-1], Lying(loadings[-1])], *args)

    with publisher_of(source, engines, require="live") as publisher:
        publisher.publish()
        step(source)
        with monkeypatch.context() as patched:
            patched.setattr(Feeder, "feed", lying)
            assert [engine.ok for engine in publisher.publish().engines] == [True, False, False, False]
        for _ in range(2):
            step(source)
            report = publisher.publish()
            assert [bool(nbytes) for nbytes in sent(report)] == [True, True, True, False]
            assert all(engine.models[0].holds(source) for engine in engines)


def test_an_engine_that_joins_anew_is_not_what_its_predecessor_was_suspected_of(
    make: Callable[..., list[LocalEngine]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engines, source = make(4), weights()
    with publisher_of(source, engines, require="live") as publisher:
        assert not any(sent(publisher.publish())[1:])
        fed = [engine for engine in publisher._first_rank("test")._fleet.engines if engine.name in ("e1", "e2")]
        for engine in fed:
            engine.workers[0].suspicion, engine.workers[0].site = "it lied", ""
        step(source)
        report = publisher.publish()
        assert [bool(nbytes) for nbytes in sent(report)] == [True, True, True, False]
        assert ["it lied" in engine.workers[0].reason for engine in report.engines] == [False, True, True, False]
        publisher.remove("e1")
        publisher.add(engines[1])
        step(source)
        assert [bool(nbytes) for nbytes in sent(publisher.publish())] == [True, True, False, False]
        assert all(engine.models[0].holds(source) for engine in engines)
