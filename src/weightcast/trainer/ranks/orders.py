"""What trainer rank 0 orders and the other ranks answer: the bodies of ``rank_order`` and ``rank_answer``."""

from __future__ import annotations

import msgspec

from weightcast.errors import ProtocolError, RoundFailed, WeightcastError, error_from_wire
from weightcast.known import known
from weightcast.layout import Layout
from weightcast.manifest import Manifest
from weightcast.plan import Copy


class ErrorForm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An error as it travels."""

    kind: str
    message: str
    engine: str | None = None
    worker: int | None = None
    phase: str | None = None
    round: int | None = None
    hint: str | None = None
    causes: dict[str, ErrorForm] = {}
    serving: dict[str, str] = {}
    dirty: tuple[str, ...] = ()


class Order(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="do"):
    """Base of all orders."""


class Enter(Order, frozen=True, kw_only=True, tag="enter"):
    """A collective call begins; answered once this rank is in the same call."""

    what: str
    timeout_s: float


class Survey(Order, frozen=True, kw_only=True, tag="survey"):
    """Say what you hold: ``manifest`` and ``layout`` in the answer."""


class Agree(Order, frozen=True, kw_only=True, tag="agree"):
    """What all ranks together publish."""

    manifest: Manifest


class Adopt(Order, frozen=True, kw_only=True, tag="adopt"):
    """Make your memory reachable for these transports; ``moved`` and ``layout`` in the answer."""

    transports: tuple[str, ...]


class Expect(Order, frozen=True, kw_only=True, tag="expect"):
    """Be ready to digest these copies' values under a key."""

    key: str
    copies: tuple[Copy, ...]


class Pair(Order, frozen=True, kw_only=True, tag="pair"):
    """Make your ends of the pairs with a group of workers that want these copies; their offers in the order of the pairs'
    numbers in the answer's ``offers``."""

    pairs: tuple[int, ...]
    transport: str
    copies: tuple[Copy, ...]
    bucket_nbytes: int


class Connect(Order, frozen=True, kw_only=True, tag="connect"):
    """Wait until the worker of a pair is connected."""

    pair: int
    timeout_s: float


class Send(Order, frozen=True, kw_only=True, tag="send"):
    """Send a pair's bytes; how many in the answer's ``value``."""

    pair: int
    timeout_s: float


class Refresh(Order, frozen=True, kw_only=True, tag="refresh"):
    """Make your memory hold the values to publish now."""


class Digest(Order, frozen=True, kw_only=True, tag="digest"):
    """Digest what was expected under a key; ``value`` in the answer."""

    key: str
    timeout_s: float


class Abort(Order, frozen=True, kw_only=True, tag="abort"):
    """End what runs on a pair. Not answered."""

    pair: int


class Release(Order, frozen=True, kw_only=True, tag="release"):
    """Close a pair. Not answered."""

    pair: int


class Finish(Order, frozen=True, kw_only=True, tag="finish"):
    """The collective call is over: return this report (JSON, empty for none), or raise this error. Not answered."""

    report: str = ""
    error: ErrorForm | None = None


AnyOrder = Enter | Survey | Agree | Adopt | Expect | Pair | Connect | Send | Refresh | Digest | Abort | Release | Finish


class Answer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What came of an order: an error, or what the order asks for."""

    error: ErrorForm | None = None
    manifest: Manifest | None = None
    layout: Layout | None = None
    moved: bool = False
    offers: tuple[bytes, ...] = ()
    value: int = 0


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


def error_form(error: BaseException) -> ErrorForm:
    """Any error so that another rank can raise it; one that is not weightcast's own keeps its class in the text."""
    if not isinstance(error, WeightcastError):
        return ErrorForm(kind="WeightcastError", message=f"{type(error).__name__}: {error}")
    failed = error if isinstance(error, RoundFailed) else None
    return ErrorForm(
        kind=type(error).__name__,
        message=error.message,
        engine=error.engine,
        worker=error.worker,
        phase=error.phase,
        round=error.round,
        hint=error.hint,
        causes={name: error_form(cause) for name, cause in failed.causes.items()} if failed else {},
        serving=failed.serving if failed else {},
        dirty=failed.dirty if failed else (),
    )


def error_of(form: ErrorForm) -> WeightcastError:
    """The error that ``error_form`` was made from."""
    if form.kind == "RoundFailed":
        causes = {name: error_of(cause) for name, cause in form.causes.items()}
        error: WeightcastError = RoundFailed(form.message, causes=causes, serving=form.serving, dirty=form.dirty)
    else:
        error = error_from_wire(form.kind, form.message)
    error.hint = form.hint or error.hint
    return error.at(engine=form.engine, worker=form.worker, phase=form.phase, round=form.round)
