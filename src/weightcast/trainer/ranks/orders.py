"""What trainer rank 0 orders and the other ranks answer: the bodies of ``rank_order`` and ``rank_answer``."""

from __future__ import annotations

from typing import Annotated

import msgspec

from weightcast.deadline import MOST_S
from weightcast.errors import (
    ErrorForm,
    ProtocolError,
    RoundFailed,
    WakeFailed,
    WeightcastError,
)
from weightcast.facts import Facts
from weightcast.layout.table import LayoutTable
from weightcast.manifest import Manifest
from weightcast.plan import CopyColumns
from weightcast.untrusted.known import known


class Order(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="do"):
    """Base of all orders."""


class Enter(Order, frozen=True, kw_only=True, tag="enter"):
    """A collective call begins; answered once this rank is in the same call."""

    what: str
    timeout_s: float


class Survey(Order, frozen=True, kw_only=True, tag="survey"):
    """Say what you hold: ``manifest``, and a ``layout`` of that manifest's tensors, in the answer."""


class Renew(Order, frozen=True, kw_only=True, tag="renew"):
    """Look at what you publish anew; ``moved`` in the answer when you hold it elsewhere or in another form."""


class Agree(Order, frozen=True, kw_only=True, tag="agree"):
    """What all ranks together publish."""

    manifest: Manifest


class Adopt(Order, frozen=True, kw_only=True, tag="adopt"):
    """Make your memory reachable for these transports; ``moved`` and ``layout``, of the tensors agreed on, in the answer."""

    transports: tuple[str, ...]


class Expect(Order, frozen=True, kw_only=True, tag="expect"):
    """Be ready to digest these copies' values under a key; at the positions of ``manifest``, or of what is published."""

    key: str
    copies: CopyColumns
    manifest: Manifest | None = None


class Keep(Order, frozen=True, kw_only=True, tag="keep"):
    """Expect nothing any more but what has these keys: nobody needs the rest."""

    keys: tuple[str, ...]


class Pair(Order, frozen=True, kw_only=True, tag="pair"):
    """Make your ends of the pairs with a group of workers that want these copies; their offers in the order of the pairs'
    numbers in the answer's ``offers``. ``keeps``: keep what you send, as this content; nothing where it is empty. ``patience_s``: the
    workers are a chain and feed each other, and give up who is silent for so long; 0 where they are none."""

    pairs: tuple[int, ...]
    transport: str
    copies: CopyColumns
    bucket_nbytes: int
    keeps: str = ""
    patience_s: Annotated[float, msgspec.Meta(ge=0, le=MOST_S)] = 0.0


class Connect(Order, frozen=True, kw_only=True, tag="connect"):
    """Wait until the worker of a pair is connected."""

    pair: int
    timeout_s: float


class Send(Order, frozen=True, kw_only=True, tag="send"):
    """Send a pair's bytes; how many in the answer's ``value``. ``number``: that of the round, where you keep what you send.
    ``feeds``: whether workers that are a chain feed each other."""

    pair: int
    timeout_s: float
    number: int | None = None
    changes: bool = False
    feeds: bool = True


class Refresh(Order, frozen=True, kw_only=True, tag="refresh"):
    """Make your memory hold the values to publish now."""

    timeout_s: float


class Exhaust(Order, frozen=True, kw_only=True, tag="exhaust"):
    """Read the stream that you publish to its end and keep nothing: rank 0 reads its own, and gathers with you."""


class LetGo(Order, frozen=True, kw_only=True, tag="let_go"):
    """Engines hold nothing of your memory any more: hold nothing beside it, and call what your user gave to release it, if anything."""

    always: bool = False
    """Let go also where the user gave nothing."""


class Digest(Order, frozen=True, kw_only=True, tag="digest"):
    """Digest what was expected under a key; ``value`` in the answer."""

    key: str
    timeout_s: float


class CountNonFinite(Order, frozen=True, kw_only=True, tag="count_non_finite"):
    """Count the values that are NaN or infinite of what was expected under a key; ``counts`` in the answer."""

    key: str
    timeout_s: float


class Abort(Order, frozen=True, kw_only=True, tag="abort"):
    """End what runs on a pair. Not answered."""

    pair: int


class Release(Order, frozen=True, kw_only=True, tag="release"):
    """Close a pair. Not answered."""

    pair: int


class Finish(Order, frozen=True, kw_only=True, tag="finish"):
    """The collective call is over: return this report (JSON, empty for none), or raise this error. Not answered.

    ``causes``, ``serving``, ``dirty`` and ``asleep`` are those of a RoundFailed, or of a WakeFailed with its ``version``.
    """

    report: str = ""
    error: ErrorForm | None = None
    causes: dict[str, ErrorForm] = {}
    serving: dict[str, str] = {}
    dirty: tuple[str, ...] = ()
    asleep: dict[str, tuple[str, ...]] = {}
    version: str = ""

    @classmethod
    def failed(cls, error: BaseException) -> Finish:
        """The end of a call that raised ``error``."""
        form = ErrorForm.of(error)
        if isinstance(error, WakeFailed):
            return cls(error=form, asleep=error.asleep, version=error.version)
        if not isinstance(error, RoundFailed):
            return cls(error=form)
        causes = {name: ErrorForm.of(cause) for name, cause in error.causes.items()}
        return cls(error=form, causes=causes, serving=error.serving, dirty=error.dirty, asleep=error.asleep)

    def raised(self) -> WeightcastError | None:
        """The error that the call raised on rank 0, if it raised one."""
        form = self.error
        if form is not None and form.kind == WakeFailed.__name__:
            return WakeFailed(
                form.message, version=self.version, asleep=self.asleep, engine=form.engine, hint=form.hint
            )
        if form is None or form.kind != RoundFailed.__name__:
            return None if form is None else form.error()
        causes = {name: cause.error() for name, cause in self.causes.items()}
        return RoundFailed(
            form.message,
            round=form.round,
            phase=form.phase,
            causes=causes,
            serving=self.serving,
            dirty=self.dirty,
            asleep=self.asleep,
            hint=form.hint,
        )


AtOnce = Enter | Survey | Renew | Agree | Adopt | Expect | Keep | Pair | Refresh | Exhaust | LetGo
"""Orders that a rank carries out on the thread that made the call."""
Beside = Connect | Send | Digest | CountNonFinite
"""Orders that may take long, and are carried out beside that thread."""
Answered = AtOnce | Beside
AnyOrder = Answered | Abort | Release | Finish


class Answer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What came of an order: an error, or what the order asks for."""

    error: ErrorForm | None = None
    manifest: Manifest | None = None
    layout: LayoutTable | None = None
    facts: Facts | None = None
    moved: bool = False
    offers: tuple[bytes, ...] = ()
    value: int = 0
    counts: dict[str, int] = {}


_orders: msgspec.msgpack.Decoder[AnyOrder] = msgspec.msgpack.Decoder(known(AnyOrder))
_answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(known(Answer))


def encode(body: Order | Answer) -> bytes:
    return msgspec.msgpack.encode(body)


def decode_order(body: bytes) -> AnyOrder:
    """Raises ProtocolError and nothing else, whatever the bytes."""
    try:
        return _orders.decode(body)
    except (msgspec.DecodeError, WeightcastError, ValueError, RecursionError) as error:
        raise ProtocolError(f"malformed order of trainer rank 0: {error}") from None


def decode_answer(body: bytes) -> Answer:
    """Raises ProtocolError and nothing else, whatever the bytes."""
    try:
        return _answers.decode(body)
    except (msgspec.DecodeError, WeightcastError, ValueError, RecursionError) as error:
        raise ProtocolError(f"malformed answer of a trainer rank: {error}") from None
