"""Arbitrary bytes and arbitrary messages: errors with names, and an engine that goes on with what it serves."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weightcast import Publisher
from weightcast.control import Coordinator
from weightcast.deadline import Deadline
from weightcast.layout import image_layout
from weightcast.manifest import Manifest, TensorSpec
from weightcast.messages import (
    Abort,
    Begin,
    Bye,
    Heartbeat,
    Landings,
    Message,
    Offer,
    Refused,
    Setup,
    Verified,
    Welcome,
)
from weightcast.testing.fuzz.targets import TARGETS, seeds, timed
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
SMALL = st.integers(0, 3)
TIMES = st.sampled_from([0.001, 0.01, 5.0, float("nan"), float("inf"), -1.0])
TEXT = st.text(max_size=4)
MESSAGES: st.SearchStrategy[Message] = st.one_of(
    st.builds(Begin, epoch=SMALL, round=SMALL, base=TEXT, timeout_s=TIMES),
    st.builds(Verified, epoch=SMALL, round=SMALL, version=TEXT, content=TEXT, digest=st.integers(0, 2**64 - 1)),
    st.builds(Abort, epoch=SMALL, round=SMALL, reason=TEXT),
    st.builds(
        Setup,
        epoch=SMALL,
        holdings=st.dictionaries(SMALL, st.just(image_layout(MANIFEST)), max_size=2),
        offers=st.lists(
            st.builds(
                Offer,
                rank=SMALL,
                transport=st.sampled_from(["shm", "gloo", "nccl", "nonsense"]),
                data=st.binary(max_size=8) | st.sampled_from(seeds("offers")),
            ),
            max_size=2,
        ).map(tuple),
        timeout_s=TIMES,
    ),
    st.builds(Refused, kind=TEXT, message=TEXT),
    st.builds(
        Welcome,
        session=TEXT,
        manifest=st.just(MANIFEST),
        mode=st.sampled_from(["auto", "staged", "in_place"]),
        shadows=st.integers(1, 2),
        heartbeat_s=st.just(0.5),
        silence_s=st.just(5.0),
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
                mode=mode,
                shadows=1,
                heartbeat_s=0.5,
                silence_s=5.0,  # type: ignore[arg-type]
            )
        )
        try:
            _join(engine, rogue)
            (member,) = rogue.wait_members("victim", 1, Deadline(5))
            rogue.take(member, Landings, Deadline(5), phase="join")
            for message in said:
                rogue.send(member, message)
            if leaves:
                rogue.send(member, Bye(reason="fuzzed"))
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


def _join(engine: LocalEngine, trainer: Coordinator) -> None:
    """Also while the engine does not know yet that the trainer before has gone."""
    info = {
        "address": f"tcp://127.0.0.1:{trainer.port}",
        "public_key": trainer.public_key,
        "ticket": trainer.issue_ticket("victim", 1),
        "engine": "victim",
        "timeout_s": 5.0,
        "takeover": True,
    }
    start = time.monotonic()
    engine.init(info, Deadline(5))
    assert time.monotonic() - start < 5
