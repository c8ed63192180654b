"""Frames of the control channel: what was said is what is heard, and nothing else than ProtocolError comes of garbage."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.tables import holdings_of

from weightcast.errors import ErrorForm, ProtocolError
from weightcast.facts import Facts
from weightcast.layout import image_layout
from weightcast.layout.table import LayoutTable
from weightcast.manifest import Manifest, TensorSpec
from weightcast.messages import (
    PROTOCOL,
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
    decode,
    encode,
)

MANIFEST = Manifest.of(
    [TensorSpec(name="w", dtype="bfloat16", shape=(3, 4)), TensorSpec(name="s", dtype="int64", shape=())]
)
LAYOUT = image_layout(MANIFEST)
HELD = holdings_of(MANIFEST, {0: LAYOUT, 3: LAYOUT})
FACTS = Facts(host="h", pid=1, device="cpu")

EXAMPLES: list[Message] = [
    Heartbeat(),
    Bye(reason="done", settled=True),
    Refused(error=ErrorForm(kind="AuthError", message="no")),
    Hello(ticket="t", engine="e", rank=0, world_size=2, facts=FACTS, version="3-ab", digest="", dirty=False, highest=3),
    Welcome(session="s", manifest=MANIFEST, mode="auto", shadows=1, keep=()),
    Landings(layout=LayoutTable.of(LAYOUT, MANIFEST), mode="staged", shadow_nbytes=512, shadow="cpu"),
    Setup(epoch=1, holdings=HELD, offers=(Offer(rank=0, transport="shm", data=b"\x00\xff"),), timeout_s=1.5),
    Ready(epoch=1, plan_digest="00"),
    Begin(epoch=1, round=2, base="3-ab", changes=True, timeout_s=2.0),
    Filled(epoch=1, round=2, window=3),
    LetGo(epoch=3),
    Read(epoch=1, round=2, window=3),
    Staged(epoch=1, round=2, digest=2**64 - 1, digested="changed", nbytes=5, transfer_s=0.1, digest_s=0.1),
    Verified(epoch=1, round=2, version="4-cd", content="ff", digest=2**63),
    Committed(epoch=1, round=2, digest=1, digested="all", nbytes=0, transfer_s=0.0, apply_s=0.1, digest_s=0.1),
    Abort(epoch=1, round=2, reason="r"),
    Failed(epoch=1, round=2, error=ErrorForm(kind="PeerLost", message="m", hint="h", phase="transfer"), dirty=True),
    RankOrder(call=3, number=17, body=b"\x81\xff"),
    RankAnswer(number=17, body=b"\x00", failed=True),
]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_what_is_said_is_heard(message: Message) -> None:
    assert decode(encode(message)) == message


def test_every_message_is_among_the_examples() -> None:
    assert {type(message) for message in EXAMPLES} == set(Message.__subclasses__())


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_surplus_missing_and_foreign_fields_are_refused(message: Message) -> None:
    body = msgspec.msgpack.decode(encode(message)[1:])
    damaged = [{**body, "surplus": 1}, {**body, "type": "unheard"}, {k: v for k, v in body.items() if k != "type"}]
    damaged += [{k: v for k, v in body.items() if k != name} for name in body if name != "type"]
    damaged += [{**body, name: {"no": ["such", "thing"]}} for name in body if name != "type" and name != "holdings"]
    for fields in damaged:
        with pytest.raises(ProtocolError):
            decode(bytes([PROTOCOL]) + msgspec.msgpack.encode(fields))


@pytest.mark.parametrize("shadows", [-1, 0, 3, 10**9])
def test_a_trainer_asks_for_one_shadow_or_two(shadows: int) -> None:
    welcome = next(message for message in EXAMPLES if isinstance(message, Welcome))
    with pytest.raises(ProtocolError, match="shadows"):
        decode(encode(msgspec.structs.replace(welcome, shadows=shadows)))


def test_another_protocol_is_refused_by_number() -> None:
    with pytest.raises(ProtocolError, match="protocol 9"):
        decode(bytes([9]) + encode(Heartbeat())[1:])


@settings(max_examples=300, deadline=None)
@given(frame=st.one_of(st.binary(max_size=200), st.binary(max_size=100).map(lambda b: bytes([PROTOCOL]) + b)))
def test_garbage_is_a_protocol_error(frame: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(frame)


@settings(max_examples=300, deadline=None)
@given(message=st.sampled_from(EXAMPLES), data=st.data())
def test_a_damaged_frame_is_a_message_or_a_protocol_error(message: Message, data: st.DataObject) -> None:
    frame = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        heard = decode(bytes(frame))
    except ProtocolError:
        return
    assert isinstance(heard, Message)
