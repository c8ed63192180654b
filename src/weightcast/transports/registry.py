"""Names to transports: built in, installed by third parties (entry point group ``weightcast.transports``) or registered.

Which is taken where a pair can use several is the transports' own business: each gives a number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import EntryPoint
from types import MappingProxyType

from weightcast.errors import InvalidInput, Unsupported, WeightcastError
from weightcast.transports.base import Facts, Transport
from weightcast.untrusted.plugins import entry_points_of, refusal

ENTRY_POINT_GROUP = "weightcast.transports"

NOTHING: Mapping[str, str] = MappingProxyType({})


class TransportRegistry:
    """One object per transport, made when the transport's name is first asked for.

    A transport whose import fails is remembered with the reason, and everybody who asks for the transport is told the reason.
    """

    def __init__(self, points: Iterable[EntryPoint] | None = None) -> None:
        """``points`` stands in for the entry points of installed packages."""
        self._points = entry_points_of(ENTRY_POINT_GROUP, points)
        self._transports: dict[str, Transport] = {}
        self._classes: dict[str, type[Transport]] = {}
        self._failures: dict[str, str] = {}

    def register(self, name: str, transport_class: type[Transport]) -> None:
        """Add a transport by hand. A name that is taken, or is not the class's own, raises InvalidInput."""
        if name in self._known():
            raise InvalidInput(f"transport {name!r} is registered already", field="name")
        if getattr(transport_class, "name", None) != name:
            raise InvalidInput(f"{transport_class.__name__}.name is not {name!r}", field="name")
        self._transports[name] = transport_class()

    def names(self) -> tuple[str, ...]:
        """Return all transports that can be asked for by name, the most preferred first, whether or not they load. One that cannot be
        imported comes before all others: nobody knows what place it would have."""
        return tuple(sorted(self._known(), key=lambda name: (-self._preference(name), name)))

    def available(self) -> tuple[str, ...]:
        """Return the names of the transports that load in this process, the most preferred first."""
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
        """The most preferred transport that suits both sides and that they can use, and why none of a higher preference was taken, in words
        for a user. One that does not suit them goes without saying.

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
            reason = self.why_not(name, trainer, worker, unusable)
            if reason is None:
                why = _told({n: said for n, said in passed_over.items() if self._suits(n, trainer, worker)})
                return self.get(name), f"{name} ({why})" if why else f"{name} (first choice)"
            passed_over[name] = reason
        raise Unsupported(
            f"no transport between trainer {trainer.pid} and worker {worker.pid}: {_told(passed_over)}",
            hint="`weightcast doctor` on both machines lists what works there",
        )

    def why_not(self, name: str, trainer: Facts, worker: Facts, unusable: Mapping[str, str] = NOTHING) -> str | None:
        """Return why a pair does not take the transport ``name`` by itself; None when the pair may."""
        obstacle = unusable.get(name) or self._obstacle(name, trainer, worker)
        return obstacle or (None if self._suits(name, trainer, worker) else "it has to be asked for by name")

    def _obstacle(self, name: str, trainer: Facts, worker: Facts) -> str | None:
        reason = self.failure(name)
        if reason is not None:
            return reason
        for side, facts in (("trainer", trainer), ("worker", worker)):
            if name not in facts.transports:
                return f"the {side} cannot load it"
        return self._transports[name].refusal(trainer, worker)

    def _known(self) -> set[str]:
        return {*self._points, *self._transports}

    def _preference(self, name: str) -> float:
        """Also of a transport that is imported and cannot be made here."""
        self.failure(name)
        known = self._transports.get(name) or self._classes.get(name)
        number = getattr(known, "preference", None)
        return number if isinstance(number, int) else math.inf

    def _suits(self, name: str, trainer: Facts, worker: Facts) -> bool:
        """Also of a transport that cannot be made here; True of one of which nothing is known."""
        known = self._transports.get(name) or self._classes.get(name)
        return known is None or known.suits(trainer, worker)

    def _load(self, name: str) -> None:
        """Import one entry point. Catches everything: an optional library may fail in any way, and is remembered."""
        point = self._points.get(name)
        if point is None:
            # Not remembered: the name may be registered later.
            raise Unsupported(f"no transport {name!r}", hint=f"Known: {', '.join(sorted(self._known()))}")
        forbidden = refusal(point)
        if forbidden is not None:
            self._failures[name] = forbidden
            return
        try:
            loaded = point.load()
            if isinstance(loaded, type) and issubclass(loaded, Transport):
                self._classes[name] = loaded
            transport = loaded()
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


@cache
def registry() -> TransportRegistry:
    """Return the registry of this process."""
    return TransportRegistry()
