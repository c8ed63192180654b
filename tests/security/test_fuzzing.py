"""Arbitrary bytes and arbitrary messages: errors with names, and an engine that goes on with what it serves."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.tables import holdings_of
from tests.trials.fuzz.targets import TARGETS, seeds, timed

from weightcast import Publisher
from weightcast.control import ControlLink, Coordinator
from weightcast.deadline import Deadline
from weightcast.errors import ErrorForm, WeightcastError
from weightcast.layout import image_layout
from weightcast.layout.table import LayoutTable
from weightcast.manifest import Manifest, TensorSpec
from weightcast.messages import (
    Abort,
    Begin,
    Bye,
    Committed,
    Failed,
    Filled,
    Heartbeat,
    Hello,
    Landings,
    LetGo,
    Message,
    Offer,
    RankAnswer,
    RankOrder,
    Read,
    Ready,
    Refused,
    Setup,
    Staged,
    Verified,
    Welcome,
    encode,
)
from weightcast.testing.local_engine import DictModel, LocalEngine

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), database=None)


@st.composite
def damaged(draw: st.DrawFn, target: str) -> bytes:
    """A good input with some bytes changed, cut off or put in."""
    data = bytearray(draw(st.sampled_from(seeds(target))))
    for _ in range(draw(st.integers(0, 4))):
        position = draw(st.integers(0, len(data)))
        action = draw(st.sampled_from(["change", "cut", "insert"]))
        if action == "insert":
            data[position:position] = draw(st.binary(min_size=1, max_size=8))
        elif action == "cut":
            del data[position : position + draw(st.integers(1, 8))]
        elif position < len(data):
            data[position] = draw(st.integers(0, 255))
    return bytes(data)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_arbitrary_bytes(name: str) -> None:
    check = timed(TARGETS[name], limit_s=5.0)

    @FUZZ
    @given(data=st.binary(max_size=300) | damaged(name))
    def examples(data: bytes) -> None:
        check(data)

    examples()


SHAPES = {"w": (3, 4), "s": ()}
MANIFEST = Manifest.of([TensorSpec(name=name, dtype="float32", shape=shape) for name, shape in SHAPES.items()])
LAYOUT = LayoutTable.of(image_layout(MANIFEST, ("w",)), MANIFEST)
TIMEOUT_S = 1.0
SMALL = st.integers(0, 3)
TIMES = st.sampled_from([0.001, 0.01, 5.0, float("nan"), float("inf"), -1.0])
TEXT = st.text(max_size=4)
MESSAGES: st.SearchStrategy[Message] = st.one_of(
    st.builds(Begin, epoch=SMALL, round=SMALL, base=TEXT, timeout_s=TIMES),
    st.builds(Verified, epoch=SMALL, round=SMALL, version=TEXT, content=TEXT, digest=st.integers(0, 2**64 - 1)),
    st.builds(Abort, epoch=SMALL, round=SMALL, reason=TEXT),
    st.builds(Filled, epoch=SMALL, round=SMALL, window=SMALL),
    st.builds(LetGo, epoch=SMALL),
    st.builds(
        Setup,
        epoch=SMALL,
        holdings=st.dictionaries(SMALL, st.just(image_layout(MANIFEST)), max_size=2).map(
            lambda layouts: holdings_of(MANIFEST, layouts)
        ),
        offers=st.lists(
            st.builds(
                Offer,
                rank=SMALL,
                transport=st.sampled_from(["shm", "tcp", "nccl", "nonsense"]),
                data=st.binary(max_size=8) | st.sampled_from(seeds("offers")),
            ),
            max_size=2,
        ).map(tuple),
        timeout_s=TIMES,
    ),
    st.builds(Refused, error=st.builds(ErrorForm, kind=TEXT, message=TEXT)),
    st.builds(
        Welcome,
        session=TEXT,
        manifest=st.just(MANIFEST),
        mode=st.sampled_from(["auto", "staged", "in_place"]),
        shadows=st.integers(1, 2),
        keep=st.sampled_from([(), ("draft",)]),
    ),
    st.builds(Heartbeat),
)


def values() -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


@pytest.fixture
def engine() -> Iterator[LocalEngine]:
    made = LocalEngine("victim", [DictModel(values())])
    yield made
    made.stop()


@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_a_trainer_that_says_anything_in_any_order_changes_nothing(engine: LocalEngine, mode: str) -> None:
    model = engine.models[0]
    before = {name: value.clone() for name, value in model.parameters().items()}

    @settings(FUZZ, max_examples=25)
    @given(said=st.lists(MESSAGES, max_size=12), leaves=st.booleans())
    def examples(said: list[Message], leaves: bool) -> None:
        rogue = Coordinator()
        rogue.greet_with(
            lambda member: Welcome(
                session="r",
                manifest=MANIFEST,
                mode=mode,  # type: ignore[arg-type]
                shadows=1,
                keep=(),
            )
        )
        try:
            _join(engine, rogue)
            (member,) = rogue.wait_members("victim", 1, Deadline(5))
            rogue.take(member, Landings, Deadline(5), phase="join")
            for message in said:
                rogue.send(member, message)
            if leaves:
                rogue.send(member, Bye(reason="fuzzed", settled=False))
            rogue.probe([member])
        finally:
            rogue.close()
        assert engine.workers[0].weight_version == "default"
        assert model.holds(before)

    examples()
    wanted = values()
    with Publisher(wanted, [engine], takeover=True, mode=mode, timeout_s=20) as publisher:  # type: ignore[arg-type]
        assert publisher.publish().digests_match
    assert model.holds(wanted)


FAILURES = st.sampled_from(["PeerLost", "LoadError", "RoundFailed", "KeyError", ""])
ERRORS = st.builds(ErrorForm, kind=FAILURES, message=TEXT, phase=TEXT, hint=TEXT, worker=st.none() | st.integers(0, 9))
ANY_NUMBER = st.integers(-1, 3) | st.sampled_from([2**63, 2**64 - 1])
ANY_TIME = st.sampled_from([0.0, 0.1, -1.0, float("nan"), float("inf"), 1e300])
LIES: st.SearchStrategy[Message | bytes] = st.one_of(
    st.binary(max_size=12),
    st.builds(
        Landings,
        layout=st.sampled_from([LayoutTable.of(image_layout(MANIFEST), MANIFEST), LAYOUT]),
        mode=st.sampled_from(["staged", "in_place"]),
        shadow_nbytes=ANY_NUMBER,
        shadow=TEXT,
    ),
    st.builds(Read, epoch=ANY_NUMBER, round=ANY_NUMBER, window=ANY_NUMBER),
    st.builds(Ready, epoch=ANY_NUMBER, plan_digest=TEXT),
    st.builds(
        Staged,
        epoch=ANY_NUMBER,
        round=ANY_NUMBER,
        digest=ANY_NUMBER,
        nbytes=ANY_NUMBER,
        transfer_s=ANY_TIME,
        digest_s=ANY_TIME,
    ),
    st.builds(
        Committed,
        epoch=ANY_NUMBER,
        round=ANY_NUMBER,
        digest=ANY_NUMBER,
        nbytes=ANY_NUMBER,
        transfer_s=ANY_TIME,
        apply_s=ANY_TIME,
        digest_s=ANY_TIME,
    ),
    st.builds(
        Failed,
        epoch=ANY_NUMBER,
        round=ANY_NUMBER,
        error=ERRORS,
        dirty=st.booleans(),
    ),
    st.builds(Refused, error=ERRORS),
    st.builds(RankAnswer, number=ANY_NUMBER, body=st.binary(max_size=4), failed=st.booleans()),
    st.builds(RankOrder, call=ANY_NUMBER, number=ANY_NUMBER, body=st.binary(max_size=4)),
    st.builds(Bye, reason=TEXT, settled=st.booleans()),
)


class Liar:
    """Has the workers of one engine say other things before, or instead of, each thing that they would say."""

    def __init__(self, engine: str) -> None:
        self._engine = engine
        self._send = ControlLink.send
        self._links: set[int] = set()
        self.lies: list[tuple[list[Message | bytes], bool]] = []

    def send(self, link: ControlLink, message: Message) -> None:
        if isinstance(message, Hello) and message.engine == self._engine:
            self._links.add(id(link))
        if id(link) not in self._links or not self.lies:
            self._send(link, message)
            return
        said, is_silent = self.lies.pop(0)
        for lie in said:
            link._pump.send(lie if isinstance(lie, bytes) else encode(lie))
        if not is_silent:
            self._send(link, message)


@pytest.mark.parametrize("require", ["all", "live"])
def test_a_worker_that_says_anything_harms_nobody_else(
    engine: LocalEngine, require: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """publish() returns or raises an error with a name, in time, and the other engine holds the version that it names."""
    honest = LocalEngine("honest", [DictModel(values())], mode="staged")
    liar = Liar("victim")
    monkeypatch.setattr(ControlLink, "send", lambda link, message: liar.send(link, message))
    contents = {"default": {name: value.clone() for name, value in honest.models[0].parameters().items()}}

    @settings(FUZZ, max_examples=12)
    @given(lies=st.lists(st.tuples(st.lists(LIES, max_size=4), st.sampled_from([False, False, True])), max_size=6))
    def examples(lies: list[tuple[list[Message | bytes], bool]]) -> None:
        liar.lies = list(lies)
        wanted, before = values(), honest.workers[0].weight_version
        start = time.monotonic()
        with Publisher(wanted, [engine, honest], takeover=True, timeout_s=TIMEOUT_S, require=require) as publisher:  # type: ignore[arg-type]
            with suppress(WeightcastError):
                publisher.publish()
            seconds = time.monotonic() - start
        assert seconds < TIMEOUT_S + 2
        after = honest.workers[0].weight_version
        if after != before:
            contents[after] = {name: value.clone() for name, value in wanted.items()}
        assert not honest.workers[0].dirty
        assert honest.models[0].holds(contents[after])

    examples()
    liar.lies = []
    wanted = values()
    try:
        with Publisher(wanted, [engine, honest], takeover=True, timeout_s=20) as publisher:
            report = publisher.publish()
        assert report.ok
        assert report.digests_match
        assert engine.models[0].holds(wanted)
        assert honest.models[0].holds(wanted)
    finally:
        honest.stop()


def _join(engine: LocalEngine, trainer: Coordinator) -> None:
    """Also while the engine does not know yet that the trainer before has gone."""
    info = {
        "address": f"tcp://127.0.0.1:{trainer.port}",
        "public_key": trainer.public_key,
        "ticket": trainer.issue_ticket("victim", 1),
        "engine": "victim",
        "timeout_s": 30.0,
        "takeover": True,
    }
    engine.init(info, Deadline(30))
