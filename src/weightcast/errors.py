"""Every error weightcast raises, and the one form in which an error travels.

    WeightcastError
    ├── InvalidInput          bad value from a caller; nothing changed                    (HTTP 422)
    │   ├── PromptTooLong     a prompt leaves no room for an answer                       (HTTP 400)
    │   └── UnknownModel      a request names a model, or a version of an adapter, that is not served (HTTP 404)
    ├── StateError            the call is fine, the moment is not                         (HTTP 409)
    │   ├── BaseMismatch      a round builds on other weights than the worker serves
    │   └── WeightsMoved      the trainer's tensors lie elsewhere than they did, in the same form
    ├── AuthError             missing or wrong token, ticket or key                       (HTTP 401)
    ├── Unsupported           a case nobody handles, with what to do instead              (HTTP 422)
    ├── ProtocolError         a message that is malformed, unknown or of another version
    ├── PlanMismatch          both sides do not describe the same model
    ├── LoadError             the engine's own loader refused the weights
    ├── DigestMismatch        bytes arrived, and they are not the published ones
    ├── ShadowError           no memory for the staged copy
    ├── TransportError        bytes could not be moved
    │   ├── GroupBroken       ... because another worker that shares the transfer failed
    │   └── PeerLost          ... because the other side is gone
    │       └── AnswerLost    ... before its answer came: the call may have been carried out or not
    ├── DeadlineExceeded      a wait ended by its deadline
    ├── EngineError           an engine answered with an error or cannot be reached
    ├── RoundFailed           publish() did not reach n+1; says who serves what
    └── WakeFailed            publish(wake=True) reached n+1, and engines are not all awake with it

Each carries where it happened (engine, worker, phase, round) as far as known, and a hint: what to do about it. Who raises
an error and knows no better leaves the hint to its class. An error that travels to another process does so as an ErrorForm.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import msgspec

from weightcast.quoted import NAME_CHARACTERS, TEXT_CHARACTERS, quoted, quoted_lines

MERGED_HINT = "Publish the merged weights: Publisher(peft_model, engines) without adapter="
"""What to do with an adapter that an engine cannot serve as one."""


class WeightcastError(Exception):
    """The base of all errors. ``str()`` gives the message, the place where the error happened, and the hint that says what to do."""

    http_status = 500
    default_hint: ClassVar[str | None] = "See the log of the process that the error comes from"

    def __init__(
        self,
        message: str,
        *,
        engine: str | None = None,
        worker: int | None = None,
        phase: str | None = None,
        round: int | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.engine = engine
        self.worker = worker
        self.phase = phase
        self.round = round
        self.hint = hint or self.default_hint
        self.remote_trace = ""
        """The traceback in the process that reported the error, where that was an exception of another library's."""

    def at(
        self,
        *,
        engine: str | None = None,
        worker: int | None = None,
        phase: str | None = None,
        round: int | None = None,
    ) -> WeightcastError:
        """Fill in the parts of the error's place that are not yet known, and return the error."""
        self.engine = self.engine if self.engine is not None else engine
        self.worker = self.worker if self.worker is not None else worker
        self.phase = self.phase if self.phase is not None else phase
        self.round = self.round if self.round is not None else round
        return self

    def __str__(self) -> str:
        where = [
            f"{name} {value}"
            for name, value in (
                ("engine", self.engine),
                ("worker", self.worker),
                ("phase", self.phase),
                ("round", self.round),
            )
            if value is not None
        ]
        text = f"{self.message} [{', '.join(where)}]" if where else self.message
        # A message that another process wrote out may end with its hint already.
        return f"{text}. {self.hint}" if self.hint and self.hint not in self.message else text


class InvalidInput(WeightcastError, ValueError):
    """A value that the caller gave is wrong; ``field`` names the value. Nothing was changed."""

    http_status = 422
    default_hint = "Correct the value"

    def __init__(self, message: str, *, field: str | None = None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.field = field


class PromptTooLong(InvalidInput):
    """A prompt leaves no room for an answer. Status and words are those of OpenAI's API: clients look for them and shorten the prompt."""

    http_status = 400
    default_hint = "Please reduce the length of the prompt"

    @classmethod
    def of(cls, found: str, *, max_model_len: int) -> PromptTooLong:
        """``found`` says how long the prompt is: so many tokens, or so many characters."""
        most = f"This model's maximum context length is {max_model_len} tokens"
        return cls(f"{most}. However, your prompt contains {found}, which leaves no room for an answer", field="prompt")


class UnknownModel(InvalidInput):
    """A request names a model that is not served, or a version of an adapter that is not there any more."""

    http_status = 404
    default_hint = "GET /v1/models lists what is served"


class StateError(WeightcastError):
    """The call is correct, but not allowed in the present state: another trainer is connected, the engine sleeps, the publisher is closed."""

    http_status = 409
    default_hint = "Nothing was changed; call again when that is no longer so"


class BaseMismatch(StateError):
    """A worker serves other weights than the trainer believes, as after a roll-back that the trainer did not order."""

    default_hint = "Call publish() again: the engine is asked first what it serves"


class WeightsMoved(StateError):
    """The tensors of a source lie elsewhere than when the source was made, in the same form. ``publish()`` takes them up by itself."""

    default_hint = "Call connect() to have the tensors taken up where they are"


class AuthError(WeightcastError):
    """A token, a ticket or a key is missing, wrong, used or out of date."""

    http_status = 401
    default_hint = "Give the token that the server was started with"


class Unsupported(WeightcastError, NotImplementedError):
    """A case that weightcast does not handle; the hint says what to do instead."""

    http_status = 422
    default_hint = "Do without what the message names"


class ProtocolError(WeightcastError):
    """A message is malformed, unknown, stale or of another protocol version."""

    http_status = 422
    default_hint = "Use the same version of weightcast on both sides"


class PlanMismatch(WeightcastError):
    """Trainer and engine describe different models, or compiled different plans."""

    http_status = 409
    default_hint = "Give the model that the engine serves"


class LoadError(WeightcastError):
    """The engine's own weight loader raised."""

    http_status = 422
    default_hint = "See what the engine's loader says of that tensor; the engine's log has the traceback"


class DigestMismatch(WeightcastError):
    """The bytes that arrived are not the bytes that were published. They did not go live, or were taken back."""

    default_hint = "Publish again; if the error stays, tensors change while publish() runs, or memory is faulty"


class ShadowError(WeightcastError):
    """The staged copy of the weights does not fit in memory."""

    default_hint = 'Ask for mode="in_place", or give the engine a smaller KV cache'


class TransportError(WeightcastError):
    """Bytes could not be moved between two processes."""

    default_hint = "Publish again: the pair is set up anew"


class PeerLost(TransportError):
    """The process on the other side is gone."""

    default_hint = "Restart that process if nothing else does, then publish again"

    def __init__(self, message: str, *, reached: bool = True, **about: Any) -> None:
        super().__init__(message, **about)
        self.reached = reached
        """False when nothing listened at the address, so that the call was certainly not carried out."""


class WorkerLeft(PeerLost):
    """A worker said goodbye: its engine sleeps, ends, or serves another trainer."""

    default_hint = "Restart the engine if it has ended, then publish again: it joins anew"


class NotShared(TransportError):
    """This process cannot open memory of another process of the same host, so transports that share memory cannot serve the pair."""

    default_hint = "Trainer and worker have to be one user with the same capabilities and namespaces; else ask for another transport"


class GroupBroken(TransportError):
    """A transfer that several workers share ended because another of these workers failed; the error of that worker says why."""


class AnswerLost(PeerLost):
    """The connection broke before the engine answered. The call may have been carried out or not."""

    default_hint = "Publish again: the engine is asked what it serves"


class DeadlineExceeded(WeightcastError, TimeoutError):
    """A wait ended because its deadline passed."""

    default_hint = "See what keeps the other side; if it is only slow, give more timeout_s"


class EngineError(WeightcastError):
    """An engine answered with an error of its own, or is not serving."""

    default_hint = "See the engine's log"


class RoundFailed(WeightcastError):
    """``publish()`` did not bring the fleet to the next version.

    ``causes`` maps the name of each engine that failed to its error. ``serving`` maps the name of every engine to the version that the
    engine serves now. ``dirty`` names the engines that hold weights of no version; they answer 503 until a round succeeds. ``asleep`` maps the
    name of each engine that ``publish(wake=True)`` was to wake to what of its memory still sleeps; all other memory of it is awake.
    """

    default_hint = "Call publish() again"

    def __init__(
        self,
        message: str,
        *,
        round: int | None = None,
        phase: str | None = None,
        causes: Mapping[str, WeightcastError] | None = None,
        serving: Mapping[str, str] | None = None,
        dirty: tuple[str, ...] = (),
        asleep: Mapping[str, tuple[str, ...]] | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, round=round, phase=phase, hint=hint)
        self.causes = dict(causes or {})
        self.serving = dict(serving or {})
        self.dirty = dirty
        self.asleep = dict(asleep or {})

    def __str__(self) -> str:
        lines = [super().__str__()]
        lines += [f"  {name}: {type(cause).__name__}: {cause}" for name, cause in self.causes.items()]
        lines += [f"  {name} serves {version}" for name, version in self.serving.items()]
        lines += [f"  {name} is DIRTY" for name in self.dirty]
        lines += [f"  {said}" for said in said_of_sleep(self.asleep)]
        return "\n".join(lines)


def hint_of(causes: Mapping[str, WeightcastError], otherwise: str) -> str:
    """What to do about a round with these causes: ``otherwise``, where a repetition may help, else what the causes themselves say. One
    that only follows from another worker's says nothing of that."""
    own = [cause for cause in causes.values() if not isinstance(cause, GroupBroken)]
    if not own or not all(isinstance(cause, PlanMismatch | Unsupported | InvalidInput) for cause in own):
        return otherwise
    return ". ".join(dict.fromkeys(cause.hint for cause in own if cause.hint)) or otherwise


class WakeFailed(WeightcastError):
    """``publish(wake=True)`` made the next version live, and then the trainer's ``release`` raised, or an engine did not wake up.

    ``version`` is what engines serve that took part in the round. ``asleep`` maps each of them to what of its memory still sleeps;
    all other memory is awake. An engine goes on computing when nothing of it sleeps any more.
    """

    default_hint = "Call publish(wake=True) again, or wake the engines up"

    def __init__(
        self,
        message: str,
        *,
        version: str = "",
        asleep: Mapping[str, tuple[str, ...]] | None = None,
        engine: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, engine=engine, phase="wake", hint=hint)
        self.version = version
        self.asleep = dict(asleep or {})


def said_of_sleep(asleep: Mapping[str, tuple[str, ...]]) -> list[str]:
    """What sleeps in engines and what is awake, one text for each engine."""
    return [
        f"{name}: {' and '.join(tags)} asleep{'' if 'weights' in tags else ', weights awake'}"
        if tags
        else f"{name}: awake"
        for name, tags in asleep.items()
    ]


class ErrorForm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An error as it travels: the one form of all messages, HTTP answers, workers' outcomes and remote calls.

    Texts are cut and cleaned when a form is made, on the sender's side and on the receiver's: a peer's text never reaches a log or
    a terminal as the peer wrote it. ``trace`` is the traceback of an exception that is not weightcast's own.
    """

    kind: str
    message: str
    engine: str | None = None
    worker: Annotated[int, msgspec.Meta(ge=0)] | None = None
    phase: str | None = None
    round: Annotated[int, msgspec.Meta(ge=0)] | None = None
    field: str | None = None
    hint: str | None = None
    trace: str = ""

    def __post_init__(self) -> None:
        for name in ("message", "hint", "kind", "engine", "phase", "field"):
            text = getattr(self, name)
            if text is not None:
                limit = TEXT_CHARACTERS if name in ("message", "hint") else NAME_CHARACTERS
                msgspec.structs.force_setattr(self, name, quoted(text, limit))
        msgspec.structs.force_setattr(self, "trace", quoted_lines(self.trace))

    @classmethod
    def of(cls, error: BaseException, *, otherwise: type[WeightcastError] = WeightcastError) -> ErrorForm:
        """The form of any error. One that is not weightcast's own travels as an ``otherwise`` with its class in the text."""
        if not isinstance(error, WeightcastError):
            return cls(kind=otherwise.__name__, message=f"{type(error).__name__}: {error}", trace=_trace(error))
        field = getattr(error, "field", None)
        return cls(
            kind=type(error).__name__,
            message=error.message,
            engine=error.engine,
            worker=error.worker,
            phase=error.phase,
            round=error.round,
            field=field if isinstance(field, str) else None,
            hint=error.hint,
            trace=error.remote_trace or _trace(error.__cause__),
        )

    def error(
        self, *, engine: str | None = None, worker: int | None = None, phase: str | None = None
    ) -> WeightcastError:
        """The error to raise; an unknown ``kind`` becomes a plain WeightcastError. The arguments are what the receiver knows for
        itself: they win over what the peer says. Without a hint of the peer's the error has that of its class."""
        error = _BY_NAME.get(self.kind, WeightcastError)(self.message, hint=self.hint)
        if isinstance(error, InvalidInput):
            error.field = self.field
        error.at(engine=engine, worker=worker, phase=phase)
        error.at(engine=self.engine, worker=self.worker, phase=self.phase, round=self.round)
        if self.trace:
            error.remote_trace = self.trace
            error.add_note(f"Traceback of the process that reported it:\n{self.trace}")
        return error


def _trace(error: BaseException | None) -> str:
    """The traceback of an exception that no class of weightcast's explains; empty for one that is."""
    if error is None or isinstance(error, WeightcastError):
        return ""
    return "".join(traceback.format_exception(error))


_BY_NAME = {
    kind.__name__: kind
    for kind in (
        InvalidInput,
        PromptTooLong,
        UnknownModel,
        StateError,
        BaseMismatch,
        WeightsMoved,
        AuthError,
        Unsupported,
        ProtocolError,
        PlanMismatch,
        LoadError,
        DigestMismatch,
        ShadowError,
        TransportError,
        NotShared,
        GroupBroken,
        PeerLost,
        WorkerLeft,
        AnswerLost,
        DeadlineExceeded,
        EngineError,
        WakeFailed,
    )
}
