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
    finally:
        for engine in engines:
            engine.stop()


def test_auto_takes_engines_of_one_host_that_is_not_the_trainers(
    make: Callable[..., list[LocalEngine]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engines, source = make(5), weights()
    for engine, host in zip(engines, ("10.1.1.1", "10.1.1.2", "10.1.1.1", "10.1.1.2", "127.0.0.1"), strict=True):
        engine.host = host
    with publisher_of(source, engines, relay="auto", address="127.0.0.1") as publisher:
        assert all(sent(publisher.publish()))  # their processes are on this machine, whatever their hosts
    real = all_ranks.local_facts
    elsewhere = lambda *args, **more: msgspec.structs.replace(real(*args, **more), host="another")  # noqa: E731
    monkeypatch.setattr(all_ranks, "local_facts", elsewhere)
    with publisher_of(source, engines, relay="auto", address="127.0.0.1") as publisher:
        step(source)
        assert [bool(nbytes) for nbytes in sent(publisher.publish())] == [True, True, False, False, True]
        assert all(engine.models[0].holds(source) for engine in engines)


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
            assert outcomes[last.name].workers[0].sent_nbytes
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


@pytest.mark.parametrize("lie", ["other bytes", "another number"])
def test_a_relay_that_lies_makes_nothing_live(
    lie: str, make: Callable[..., list[LocalEngine]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong bytes end the round for all, and one that counts otherwise is not listened to."""
    engines, source = make(3), weights()
    feed = Feeder.feed

    class Lying:
        def __init__(self, honest: Loading) -> None:
            self.run, self.spans = honest.run, [bytes(len(span)) for span in honest.spans]

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
            else:
                assert all(sent(publisher.publish()))
        publisher.publish()
        assert all(engine.models[0].holds(source) for engine in engines)
