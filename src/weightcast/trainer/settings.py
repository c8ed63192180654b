"""Settings of a Publisher: one record, checked once, that the parts of a trainer share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypedDict, get_args

from weightcast.deadline import is_seconds
from weightcast.errors import InvalidInput
from weightcast.manifest.names import check_patterns
from weightcast.messages import ModeWish
from weightcast.untrusted.secret import usable_token

Require = Literal["all", "live"]
Pause = Literal["keep", "wait", "abort", "none"]
CHOICES = {"mode": get_args(ModeWish), "pause": get_args(Pause), "require": get_args(Require)}


class SettingsGiven(TypedDict, total=False):
    """Settings as keywords of ``Publisher``; ``Settings`` says what each of them means."""

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
    metrics_port: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a Publisher reaches engines, and what it does about those that fail. InvalidInput names a field that cannot be so.

    Attributes:
        token: for weight-changing routes of the servers.
        transport: "auto" or a transport's name.
        mode: "auto", "staged" or "in_place"; an engine's own setting counts before it.
        shadows: staged copies that an engine keeps where its memory has room. With 2 a commit is one copy instead of an
            exchange, which halves the time that requests in flight stand still.
        timeout_s: deadline in seconds of ``connect`` and of each ``publish``, all waits in it included.
        pause: what happens to requests in flight while the commit runs: "keep" (frozen, then continued), "wait", "abort" or
            "none" (the engine only makes sure that no step runs meanwhile; as "keep" where caches are cleared or several workers
            change).
        clear_cache: recompute keys and values of kept requests under the new weights, and forget cached prefixes.
        require: "all": every engine reaches the next version or none does. "live": an engine that fails is dropped from the round
            and the others go on; the report names the engine, and later rounds try to have it back.
        takeover: leave a trainer that is still connected to an engine when this one first joins; without it a second trainer is
            refused.
        address: where engines reach this process; found by itself when omitted.
        bucket_nbytes: bytes of the pieces that tcp and nccl send, a multiple of 256; two are in flight. None: 8 MiB for tcp,
            256 MiB for nccl.
        silence_s: a worker that is not heard for so many seconds is lost.
        log: file that every round's report is appended to, committed or not; one that cannot be written is no reason to fail.
            Numbers go on from it, also when no engine can be reached that knows the last one.
        unused: patterns (shell-style, on checkpoint names) of tensors that engines may rightly have no use for, such as value
            heads: ["v_head.*"]. Any other tensor without a place in an engine is PlanMismatch; reports list what was left out.
        metrics_port: serve Prometheus metrics on this port of the loopback interface; 0 has the system choose one, which
            ``Publisher.metrics_port`` tells.
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
    metrics_port: int | None = None

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            _require(getattr(self, name) in choices, name, f"{', '.join(choices[:-1])} or {choices[-1]}", self)
        _require(self.shadows in (1, 2), "shadows", "1 or 2", self)
        for name in ("timeout_s", "silence_s"):
            _require(is_seconds(getattr(self, name)), name, "a positive number of seconds", self)
        object.__setattr__(self, "unused", check_patterns(self.unused))
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


def _require(is_so: bool, name: str, wanted: str, settings: Settings) -> None:
    if not is_so:
        raise InvalidInput(f"{name} is {wanted}, not {getattr(settings, name)!r}", field=name)
