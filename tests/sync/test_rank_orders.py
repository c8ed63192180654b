"""Orders between trainer ranks: errors arrive as they were, garbage is a ProtocolError, and holdings have to fit together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightcast.errors import DeadlineExceeded, PeerLost, PlanMismatch, ProtocolError, RoundFailed
from weightcast.layout import Layout, Placement, Region, contiguous_strides
from weightcast.manifest import Manifest, TensorSpec
from weightcast.messages import RankOrder
from weightcast.plan import Holdings
from weightcast.trainer.ranks.coverage import check_complete, joined_manifest
from weightcast.trainer.ranks.orders import (
    Answer,
    AnyOrder,
    Enter,
    Finish,
    Order,
    Refresh,
    decode_answer,
    decode_order,
    encode,
)
from weightcast.trainer.ranks.other_rank import OtherRank


def spec(name: str, shape: tuple[int, ...] = (6, 4), dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def holding(*boxes: tuple[tuple[int, ...], tuple[int, ...]]) -> Layout:
    placements, end = [], 0
    for offsets, sizes in boxes:
        region = Region(name="w", offsets=offsets, sizes=sizes)
        placements.append(
            Placement(region=region, dtype="float32", storage=0, offset=end, strides=contiguous_strides(sizes))
        )
        end += region.numel
    return Layout(placements=tuple(placements), storage_nbytes=(4 * end,))


def test_an_error_is_raised_elsewhere_as_it_was() -> None:
    cause = PeerLost("trainer rank 1 is gone", phase="verify", hint="Start it again")
    error = RoundFailed(
        "version 7 was not published",
        round=3,
        phase="verify",
        causes={"trainer rank 1": cause, "a": DeadlineExceeded("late", engine="a", worker=2)},
        serving={"a": "6-abc"},
        dirty=("b",),
        hint="Call again",
    )
    sent = decode_order(encode(Finish.failed(error)))
    assert isinstance(sent, Finish)
    heard = sent.raised()
    assert isinstance(heard, RoundFailed)
    assert str(heard) == str(error)
    assert {name: type(cause) for name, cause in heard.causes.items()} == {
        "trainer rank 1": PeerLost,
        "a": DeadlineExceeded,
    }
    assert (heard.serving, heard.dirty) == (error.serving, error.dirty)


def test_a_foreign_error_keeps_its_name_in_the_text() -> None:
    assert "KeyError: 'w'" in str(Finish.failed(KeyError("w")).raised())


@settings(max_examples=200, deadline=None)
@given(frame=st.binary(max_size=100))
def test_garbage_is_a_protocol_error(frame: bytes) -> None:
    for decode in (decode_order, decode_answer):
        try:
            heard = decode(frame)
        except ProtocolError:
            continue
        assert heard == Answer()  # the empty map says just that


@pytest.mark.parametrize("order", [Enter(what="publish", timeout_s=1.0), Refresh(timeout_s=1.0), Finish()])
def test_surplus_fields_and_unknown_orders_are_refused(order: Enter | Refresh | Finish) -> None:
    body = msgspec.msgpack.decode(encode(order))
    for damaged in ({**body, "surplus": 1}, {**body, "do": "unheard"}):
        with pytest.raises(ProtocolError):
            decode_order(msgspec.msgpack.encode(damaged))


class Unheard(Order, frozen=True, kw_only=True, tag="unheard"):
    """An order that rank 0 gives and nobody has written down for the other ranks."""


def test_an_order_that_a_rank_does_not_know_is_answered_with_an_error_and_never_as_done() -> None:
    known = set(get_args(AnyOrder))
    assert {kind for kind in Order.__subclasses__() if kind is not Unheard} == known
    answers: list[Answer] = []
    rank: Any = object.__new__(OtherRank)
    rank._link = SimpleNamespace(send=lambda said: answers.append(decode_answer(said.body)))
    rank._do("publish", RankOrder(call=1, number=1, body=b""), Unheard())
    rank._do("publish", RankOrder(call=1, number=2, body=b""), Enter(what="publish", timeout_s=1.0))
    unheard, done = answers
    assert unheard.error is not None
    assert "Unheard" in unheard.error.message
    assert done == Answer()


def test_manifests_are_joined_in_order_of_rank() -> None:
    joined = joined_manifest({1: Manifest.of([spec("b"), spec("c")]), 0: Manifest.of([spec("a"), spec("b")])})
    assert [tensor.name for tensor in joined.tensors] == ["a", "b", "c"]
    with pytest.raises(PlanMismatch, match=r"'b' is float32 \(6, 4\) on trainer rank 0, float32 \(3, 4\) on rank 1"):
        joined_manifest({0: Manifest.of([spec("b")]), 1: Manifest.of([spec("b", (3, 4))])})


def test_holdings_have_to_be_all_of_every_tensor_cut_in_one_way() -> None:
    manifest = Manifest.of([spec("w")])
    top, bottom, left = ((0, 0), (4, 4)), ((4, 0), (2, 4)), ((0, 0), (6, 2))
    check_complete(Holdings.of(manifest, {0: holding(top), 1: holding(bottom), 2: holding(top), 3: holding(bottom)}))
    with pytest.raises(PlanMismatch, match="hold 16 of 24 elements of 'w'"):
        check_complete(Holdings.of(manifest, {0: holding(top), 1: holding(top)}))
    with pytest.raises(PlanMismatch, match="cut in different ways"):
        check_complete(Holdings.of(manifest, {0: holding(top), 1: holding(bottom), 2: holding(left)}))
    with pytest.raises(PlanMismatch, match="hold 0 of 24"):
        check_complete(Holdings.of(manifest, {0: Layout(placements=(), storage_nbytes=())}))
