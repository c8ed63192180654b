"""Names to transports: built in, installed by third parties (entry point group ``weightcast.transports``) or registered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import EntryPoint
from types import MappingProxyType

from weightcast.errors import InvalidInput, Unsupported, WeightcastError
from weightcast.transports.base import Facts, Transport
from weightcast.untrusted.plugins import entry_points_of, refusal

ENTRY_POINT_GROUP = "weightcast.transports"

PREFERENCE = ("cuda_ipc", "shm", "shm_cuda", "nccl", "tcp")
"""Best first; others come after these, in alphabetical order."""
FROM_TO = {"cuda_ipc": ("cuda", "cuda"), "nccl": ("cuda", "cuda"), "shm": ("cpu", "cpu"), "shm_cuda": ("cpu", "cuda")}
"""The kinds of memory that a transport goes between, trainer's first, where it goes between these only. That it was not taken between
others is no news."""


NOTHING: Mapping[str, str] = MappingProxyType({})


class TransportRegistry:
    """One object per transport, made when the transport's name is first asked for.

    A transport whose import fails is remembered with the reason, and everybody who asks for the transport is told the reason.
    """

    def __init__(self, points: Iterable[EntryPoint] | None = None) -> None:
        """``points`` stands in for the entry points of installed packages."""
        self._points = entry_points_of(ENTRY_POINT_GROUP, points)
        self._transports: dict[str, Transport] = {}
        self._failures: dict[str, str] = {}

    def register(self, name: str, transport_class: type[Transport]) -> None:
        """Add a transport by hand. A name that is taken, or is not the class's own, raises InvalidInput."""
        if name in self.names():
            raise InvalidInput(f"transport {name!r} is registered already", field="name")
        if getattr(transport_class, "name", None) != name:
            raise InvalidInput(f"{transport_class.__name__}.name is not {name!r}", field="name")
        self._transports[name] = transport_class()

    def names(self) -> tuple[str, ...]:
        """Return all transports that can be asked for by name, the best first, whether or not they load."""
        known = {*self._points, *self._transports}
        return tuple(sorted(known, key=lambda name: (_rank(name), name)))

    def available(self) -> tuple[str, ...]:
        """Return the names of the transports that load in this process, the best first."""
        return tuple(name for name in self.names() if self.failure(name) is None)

    def failure(self, name: str) -> str | None:
        """Return why the transport ``name`` does not load here; None when it loads."""
        if name not in self._transports and name not in self._failures:
            self._load(name)
        return self._failures.get(name)

    def get(self, name: str) -> Transport:
        """Return the transport of that name. Unsupported says why this process cannot have the transport, and which transports it can
        have."""
        reason = self.failure(name)
        if reason is not None:
            raise Unsupported(f"transport {name!r}: {reason}", hint=f"Available: {', '.join(self.available())}")
        return self._transports[name]

    def choose(
        self, trainer: Facts, worker: Facts, wanted: str | None = None, unusable: Mapping[str, str] = NOTHING
    ) -> tuple[Transport, str]:
        """The best transport that both sides can use, and why none better was taken, in words for a user. One that is for another
        kind of memory than either side has goes without saying.

        ``unusable`` are transports that were tried, with the reason why they are passed over.
        ``wanted`` is honoured or refused by name: Unsupported carries the reason. It also says so when nothing fits.
        """
        if wanted is not None:
            transport = self.get(wanted)
            reason = unusable.get(wanted) or self._obstacle(wanted, trainer, worker)
            if reason is not None:
                raise Unsupported(
                    f"transport {wanted!r} was asked for and cannot be used: {reason}",
                    hint='transport="auto" takes one that can be used',
                )
            return transport, f"{wanted} (asked for)"
        passed_over: dict[str, str] = {}
        for name in self.names():
            reason = unusable.get(name) or self._obstacle(name, trainer, worker)
            if reason is None:
                kinds = (trainer.device, worker.device)
                why = _told({n: said for n, said in passed_over.items() if FROM_TO.get(n, kinds) == kinds})
                return self.get(name), f"{name} ({why})" if why else f"{name} (first choice)"
            passed_over[name] = reason
        raise Unsupported(
            f"no transport between trainer {trainer.pid} and worker {worker.pid}: {_told(passed_over)}",
            hint="`weightcast doctor` on both machines lists what works there",
        )

    def _obstacle(self, name: str, trainer: Facts, worker: Facts) -> str | None:
        reason = self.failure(name)
        if reason is not None:
            return reason
        for side, facts in (("trainer", trainer), ("worker", worker)):
            if name not in facts.transports:
                return f"the {side} cannot load it"
        return self._transports[name].refusal(trainer, worker)

    def _load(self, name: str) -> None:
        """Import one entry point. Catches everything: an optional library may fail in any way, and is remembered."""
        point = self._points.get(name)
        if point is None:
            # Not remembered: the name may be registered later.
            raise Unsupported(f"no transport {name!r}", hint=f"Known: {', '.join(self.names())}")
        forbidden = refusal(point)
        if forbidden is not None:
            self._failures[name] = forbidden
            return
        try:
            transport = point.load()()
        except Exception as error:  # noqa: BLE001
            told = error.message if isinstance(error, WeightcastError) else f"{type(error).__name__}: {error}"
            self._failures[name] = told
            return
        if not isinstance(transport, Transport):
            self._failures[name] = f"{point.value} is not a Transport"
        else:
            self._transports[name] = transport


def _told(passed_over: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())


def _rank(name: str) -> int:
    return PREFERENCE.index(name) if name in PREFERENCE else len(PREFERENCE)


@cache
def registry() -> TransportRegistry:
    """Return the registry of this process."""
    return TransportRegistry()
