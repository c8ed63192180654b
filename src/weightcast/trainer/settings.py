"""Settings of a Publisher: one record, checked once, that the parts of a trainer share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypedDict, get_args

from weightcast.deadline import MOST_S, is_seconds
from weightcast.errors import InvalidInput
from weightcast.manifest.adapters import check_name
from weightcast.manifest.names import check_patterns
from weightcast.messages import ModeWish, Part
from weightcast.trainer.progress import Listener
from weightcast.transports.buckets import check_bucket_nbytes
from weightcast.transports.registry import registry
from weightcast.untrusted.secret import usable_token

Require = Literal["all", "live"]
Pause = Literal["keep", "wait", "abort", "none"]
CheckFinite = Literal[False, True, "count"]
Hold = Literal["always", "round"]
Delta = bool | Literal["auto"]
Relay = Literal[False, "auto"] | Sequence[Sequence[str]]
CHOICES = {
    "mode": get_args(ModeWish),
    "pause": get_args(Pause),
    "require": get_args(Require),
    "hold": get_args(Hold),
}


class SettingsGiven(TypedDict, total=False):
    """Settings as keywords of ``Publisher``; ``Settings`` says what each of them means.

    The fields stand here once more because type checkers make no keywords out of a dataclass; a test compares the two.
    """

    token: str | None
    transport: str
    mode: ModeWish
    shadows: int
    timeout_s: float
    pause: Pause
    clear_cache: bool
    require: Require
    takeover: bool
    address: str | None
    bucket_nbytes: int | None
    silence_s: float
    log: str | Path | None
    unused: Sequence[str]
    keep: Sequence[Part]
    metrics_port: int | None
    on_progress: Listener | None
    check_finite: CheckFinite
    hold: Hold
    delta: Delta
    relay: Relay
    adapter: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a Publisher reaches engines, and what the Publisher does about engines that fail. InvalidInput names a field that is wrong.

    Attributes:
        token: the token that servers demand for routes that change weights.
        transport: "auto", or the name of the transport that all pairs use.
        mode: "staged" (bytes wait beside the engine until the commit), "in_place" (bytes are written in the commit) or "auto". The
            setting of an engine takes precedence.
        shadows: the number of staged copies that an engine keeps where its memory has room. With 2 a commit is one copy instead of
            an exchange, which halves the time that requests in flight stand still.
        timeout_s: the deadline of ``connect`` and of each ``publish``, in seconds; it covers every wait of the call.
        pause: the treatment of requests in flight during the commit: "keep" freezes them and then continues them, "wait" lets them
            end, "abort" ends them, "none" only keeps the engine from running a step meanwhile. "none" is "keep" where caches are
            cleared or several workers change.
        clear_cache: compute keys and values of kept requests again under the new weights, and forget cached prefixes.
        require: with "all" every engine reaches the next version or none does. With "live" an engine that fails is dropped from the
            round and the other engines go on; the report names the engine, and later rounds try to have it back.
        takeover: have an engine leave the trainer to which it is still connected when this trainer first joins. Without takeover an
            engine refuses a second trainer.
        address: the address under which engines reach this process. None: the publisher finds the address.
        bucket_nbytes: the size of the pieces that tcp and nccl send, a multiple of 256 bytes; two pieces are in flight. None: 8 MiB
            for tcp, 256 MiB for nccl.
        silence_s: a worker that sends nothing for this many seconds is lost.
        log: the file to which the report of every round is appended, whether the round committed or not. A file that cannot be
            written fails no round. Version numbers go on from the file when no engine can be reached that knows the last number.
        unused: shell-style patterns of checkpoint names that engines do without, such as ["v_head.*"]. Any other tensor that has no
            place in an engine is a PlanMismatch. Reports list the tensors that were left out.
        keep: parts of engines that keep their weights although this trainer publishes nothing for them. The one part there is is
            "draft": the model that an engine speculates with. Without ``keep`` such an engine is a PlanMismatch.
        metrics_port: the port of the loopback interface on which Prometheus metrics are served. 0: a free port, which
            ``Publisher.metrics_port`` names.
        on_progress: called with a ``trainer.progress.Step`` when a step of connecting or publishing begins, on whatever thread takes
            the step; it has to return at once.
        check_finite: True: ``publish`` refuses values that are NaN or infinite with a StateError that names their tensors, and nothing
            is changed. "count": they are published, and the report counts them. Either reads all values once more in each round:
            as much as a digest does, or a few times that on a CPU. Not for streams.
        hold: with "round" engines map nothing of the trainer's memory between calls, and the publisher refers to none of a module's or
            a mapping's, so that what the program moves or frees is free; each call then sets the pairs up anew, which takes some
            milliseconds. With "always" memory stays mapped until it moves.
        delta: True: rounds over tcp and tls send what changed since the round before, where that is less than all values. Each trainer
            rank keeps in host memory what it sent last, once for all workers with equal layouts; reports count these bytes in
            ``own_nbytes``. "auto": only where rounds have shown that this is faster than all values. Whenever it is not certain that a
            worker holds what was sent last, as after a round that failed, all values are sent. Not for streams.
        relay: engines of one site feed each other over tcp and tls: the trainer sends all values to the first one, and each sends them
            on to the next while they come, so that a slow link carries them once. A list of lists of engines' names says which engines
            are a site. "auto": engines whose URLs have addresses of one network (24 bits, of IPv6 64), or the same name, are a site, but
            for those on the trainer's own machine; they feed each other where rounds have shown that this is faster. A relay
            that dies, stops or is cut off is given up after ``silence_s``, or a quarter of the time left, and the trainer sends what
            has not come. Only workers with equal layouts that keep tensors in the type in which these are published. Not together
            with ``delta``.
        adapter: publish a LoRA adapter of a PEFT model by itself, under this name: the adapter that has the name in the model, or the
            model's only one. Requests for the name that start after ``publish`` run on the new version, and those in flight
            keep theirs; nothing pauses, so ``pause`` and ``clear_cache`` mean nothing, and ``mode`` is staged. Versions are counted for
            each adapter and are named ``policy@3-9f2c…`` where requests and outputs name them.
    """

    token: str | None = field(default=None, repr=False)
    transport: str = "auto"
    mode: ModeWish = "auto"
    shadows: int = 1
    timeout_s: float = 60.0
    pause: Pause = "keep"
    clear_cache: bool = True
    require: Require = "all"
    takeover: bool = False
    address: str | None = None
    bucket_nbytes: int | None = None
    silence_s: float = 5.0
    log: str | Path | None = None
    unused: Sequence[str] = ()
    keep: Sequence[Part] = ()
    metrics_port: int | None = None
    on_progress: Listener | None = field(default=None, repr=False)
    check_finite: CheckFinite = False
    hold: Hold = "always"
    delta: Delta = False
    relay: Relay = False
    adapter: str | None = None

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            _require(getattr(self, name) in choices, name, f"{', '.join(choices[:-1])} or {choices[-1]}", self)
        _require(self.shadows in (1, 2), "shadows", "1 or 2", self)
        is_choice = isinstance(self.check_finite, bool) or self.check_finite == "count"
        _require(is_choice, "check_finite", 'True, False or "count"', self)
        is_choice = isinstance(self.delta, bool) or self.delta == "auto"
        _require(is_choice, "delta", 'True, False or "auto"', self)
        object.__setattr__(self, "relay", _checked_relay(self))
        if self.adapter is not None:
            check_name(self.adapter)
            _require(self.mode != "in_place", "mode", '"auto" or "staged" for an adapter', self)
        for name in ("clear_cache", "takeover"):
            _require(isinstance(getattr(self, name), bool), name, "True or False", self)
        for name in ("transport", "address"):
            value = getattr(self, name)
            _require(isinstance(value, str) or (name == "address" and value is None), name, "a text", self)
        _require(self.log is None or isinstance(self.log, str | Path), "log", "the path of a file", self)
        _require(self.on_progress is None or callable(self.on_progress), "on_progress", "a function of a Step", self)
        if self.transport != "auto":
            registry().get(self.transport)
        if self.bucket_nbytes is not None:
            check_bucket_nbytes(self.bucket_nbytes)
        for name in ("timeout_s", "silence_s"):
            _require(is_seconds(getattr(self, name)), name, f"a positive number of seconds, at most {MOST_S:g}", self)
        _require(self.silence_s <= 86400, "silence_s", "a positive number of seconds, 86400 at most", self)
        object.__setattr__(self, "unused", check_patterns(self.unused))
        is_parts = isinstance(self.keep, list | tuple) and set(self.keep) <= set(get_args(Part))
        _require(is_parts, "keep", f"a list of {', '.join(map(repr, get_args(Part)))}", self)
        object.__setattr__(self, "token", usable_token(self.token))

    @property
    def reached_at(self) -> str:
        """The address at which engines reach this process, once it is known."""
        assert self.address is not None
        return self.address

    @property
    def shares(self) -> bool:
        """Whether engines may share transfers, by transports that can: where one breaks all do."""
        return self.require == "all"


def _checked_relay(settings: Settings) -> Relay:
    relay = settings.relay
    if relay is False or relay == "auto":
        sites: Relay = relay
    else:
        is_lists = isinstance(relay, list | tuple) and all(isinstance(names, list | tuple) for names in relay)
        is_named = is_lists and all(isinstance(name, str) for names in relay for name in names)
        _require(is_named, "relay", 'False, "auto" or a list of lists of engines\' names', settings)
        sites = tuple(map(tuple, relay))
        named = [name for names in sites for name in names]
        _require(len(named) == len(set(named)), "relay", "a list in which each engine stands once", settings)
    if sites and settings.delta:
        raise InvalidInput(
            "relay and delta cannot be combined: a relay sends all values on",
            field="relay",
            hint="Leave one of the two out",
        )
    return sites


def _require(is_so: bool, name: str, wanted: str, settings: Settings) -> None:
    if not is_so:
        raise InvalidInput(f"{name} is {wanted}, not {getattr(settings, name)!r}", field=name)
