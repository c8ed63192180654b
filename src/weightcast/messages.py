"""Messages of the control channel: msgpack structs behind one version byte.

A frame is ``PROTOCOL`` (one byte) and the msgpack map of one struct below, whose "type" field names it. A frame of another
version, an unknown type, a missing, surplus or ill-typed field, or a number out of its range is ProtocolError. Nothing is
unpickled, nothing is code. The table of who sends what when is in docs/protocol.md.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from weightcast.deadline import Seconds
from weightcast.errors import ErrorForm, ProtocolError, WeightcastError
from weightcast.facts import Facts
from weightcast.layout.table import LayoutTable
from weightcast.manifest import Manifest
from weightcast.plan import HoldingTable
from weightcast.quoted import quote_fields, quoted
from weightcast.untrusted.known import known
from weightcast.untrusted.secret import repr_without

PROTOCOL = 3
MAX_FRAME_NBYTES = 256 * 2**20

Count = Annotated[int, msgspec.Meta(ge=0)]
Timeout = Annotated[float, msgspec.Meta(gt=0, le=1e9)]

Mode = Literal["staged", "in_place"]
ModeWish = Literal["auto", "staged", "in_place"]


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    """Base of all messages. Their texts are cut and cleaned when a message is made or decoded."""

    def __post_init__(self) -> None:
        quote_fields(self)


class Heartbeat(Message, frozen=True, kw_only=True, tag="heartbeat"):
    """Coordinator, now and then: ZeroMQ tells of a connection that has closed when something is sent over it."""


class Bye(Message, frozen=True, kw_only=True, tag="bye"):
    """Either side leaves on purpose. ``settled``: no round of the trainer that leaves will be taken back any more."""

    reason: str
    settled: bool


class Refused(Message, frozen=True, kw_only=True, tag="refused"):
    """Coordinator: you cannot join, or what you sent cannot be used."""

    error: ErrorForm


class Hello(Message, frozen=True, kw_only=True, tag="hello"):
    """Worker: first message; the ticket admits it once. ``highest`` is the highest version number that it has ever begun to
    make live, also where that was taken back: a trainer goes on after it. A rank that does not fit is refused, not dropped."""

    ticket: str
    engine: str
    rank: int
    world_size: int
    facts: Facts
    version: str
    digest: str
    dirty: bool
    highest: Count

    __repr__ = repr_without("ticket")


Part = Literal["draft"]
"""A part of an engine's weights that a trainer may publish nothing for."""


class Welcome(Message, frozen=True, kw_only=True, tag="welcome"):
    """Coordinator: what is published. ``shadows`` is how many staged copies to keep where there is room; ``keep`` names parts of
    engines that keep their weights."""

    session: str
    manifest: Manifest
    mode: ModeWish
    shadows: Annotated[int, msgspec.Meta(ge=1, le=2)]
    keep: tuple[Part, ...]


class Landings(Message, frozen=True, kw_only=True, tag="landings"):
    """Worker: what it wants and where it lands; ``shadow_nbytes`` is the size of its staged copy (0: in place)."""

    layout: LayoutTable
    mode: Mode
    shadow_nbytes: Count
    shadow: str


class Offer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one trainer rank's bytes come: the transport's name and what its worker end needs to connect."""

    rank: Count
    transport: str
    data: bytes


class Setup(Message, frozen=True, kw_only=True, tag="setup"):
    """Coordinator: the holdings that this worker's landings meet, and one offer for each trainer rank that gives something."""

    epoch: Count
    holdings: HoldingTable
    offers: tuple[Offer, ...]
    timeout_s: Timeout


class LetGo(Message, frozen=True, kw_only=True, tag="let_go"):
    """Coordinator: no round comes before the next epoch's set-up; close all pairs and hold nothing of the trainer's memory."""

    epoch: Count


class Ready(Message, frozen=True, kw_only=True, tag="ready"):
    """Worker: the plan is compiled and all transports are connected; or, without a plan, nothing of the trainer's memory is held."""

    epoch: Count
    plan_digest: str


class Begin(Message, frozen=True, kw_only=True, tag="begin"):
    """Coordinator: a round is open. Staged workers start to receive; in-place workers wait for the commit.

    ``base`` is the digest of the content that this worker serves, as far as the trainer knows (empty: none that was published); a
    worker that serves another one refuses the round. None where the trainer cannot tell: the round is for whatever is there.
    ``changes``: the bytes that come may be changes of what the pair's last round brought, which is the base.
    """

    epoch: Count
    round: Count
    base: str | None
    changes: bool
    timeout_s: Timeout


class Filled(Message, frozen=True, kw_only=True, tag="filled"):
    """Coordinator: a window of a streamed round is filled; a worker that pulls may read it. Windows are filled in the
    order of their numbers."""

    epoch: Count
    round: Count
    window: Count


class Read(Message, frozen=True, kw_only=True, tag="read"):
    """Worker: it has read a window, whose memory may be filled again."""

    epoch: Count
    round: Count
    window: Count


Digested = Literal["all", "changed"]
"""Of which bytes a digest was taken: of all of them, or of those that changed, to be added to the digest before."""


class Staged(Message, frozen=True, kw_only=True, tag="staged"):
    """Worker: all bytes are in the shadow, and this is their digest."""

    epoch: Count
    round: Count
    digest: Count
    digested: Digested
    nbytes: Count
    transfer_s: Seconds
    digest_s: Seconds


class Verified(Message, frozen=True, kw_only=True, tag="verified"):
    """Coordinator: the round may be committed as ``version``; ``digest`` is what this worker's bytes must add up to."""

    epoch: Count
    round: Count
    version: str
    content: str
    digest: Count


class Committed(Message, frozen=True, kw_only=True, tag="committed"):
    """Worker: version n+1 is live, and this is the digest of what is live."""

    epoch: Count
    round: Count
    digest: Count
    digested: Digested
    nbytes: Count
    transfer_s: Seconds
    apply_s: Seconds
    digest_s: Seconds


class Abort(Message, frozen=True, kw_only=True, tag="abort"):
    """Coordinator: the round is over without a commit; what was staged is void."""

    epoch: Count
    round: Count
    reason: str


class Failed(Message, frozen=True, kw_only=True, tag="failed"):
    """Worker: a phase failed; ``dirty`` says whether live weights belong to no version now."""

    epoch: Count
    round: Count
    error: ErrorForm
    dirty: bool


class RankOrder(Message, frozen=True, kw_only=True, tag="rank_order"):
    """Trainer rank 0 to another rank of the same trainer: do something as part of collective call number ``call``.

    ``body`` is the trainer's own msgpack form (trainer.ranks.orders); ``number`` is repeated by the answer.
    """

    call: Count
    number: Count
    body: bytes


class RankAnswer(Message, frozen=True, kw_only=True, tag="rank_answer"):
    """Trainer rank to rank 0: what came of the order of that number."""

    number: Count
    body: bytes
    failed: bool
    """The body has an error: who waits for others before this answer need not."""


AnyMessage = (
    Heartbeat
    | Bye
    | Refused
    | Hello
    | Welcome
    | Landings
    | Setup
    | LetGo
    | Ready
    | Begin
    | Filled
    | Read
    | Staged
    | Verified
    | Committed
    | Abort
    | Failed
    | RankOrder
    | RankAnswer
)

_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(known(AnyMessage))


def encode(message: Message) -> bytes:
    """The frame of a message."""
    return bytes([PROTOCOL]) + msgspec.msgpack.encode(message)


def decode(frame: bytes) -> AnyMessage:
    """The message of a frame; raises ProtocolError and nothing else, whatever the bytes."""
    if not frame:
        raise ProtocolError("empty frame")
    if frame[0] != PROTOCOL:
        raise ProtocolError(f"protocol {frame[0]}, expected {PROTOCOL}", hint="Use the same weightcast on both sides")
    try:
        return _decoder.decode(memoryview(frame)[1:])
    except (
        msgspec.DecodeError,
        WeightcastError,
        ValueError,
        RecursionError,
    ) as error:  # ValueError: text that is not UTF-8
        raise ProtocolError(f"malformed message: {quoted(str(error), 300)}") from None
