"""Failure: how a publish failed, and what its error has to say to be of use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tests.trials.matrix.outcome import Finding, expect
from weightcast.errors import RoundFailed, WeightcastError


@dataclass(frozen=True, slots=True)
class Failure:
    """The error of a publish, its causes by name of engine, the time it took."""

    error: WeightcastError
    causes: Mapping[str, WeightcastError]
    seconds: float

    @classmethod
    def of(cls, error: WeightcastError, seconds: float) -> Failure:
        """AssertionError for an error that does not say where it happened and what to do, itself or in one of its causes."""
        causes = error.causes if isinstance(error, RoundFailed) else {error.engine or "": error}
        for each in (error, *causes.values()):
            forget_frames(each)
        expect(causes, f"the error names no cause: {error}")
        expect(error.phase and (error.round or error.phase in ("join", "setup")), f"where was it? {error}")
        expect(error.hint, f"what is to be done? {error}")
        for name, cause in causes.items():
            expect(cause.engine == name and cause.phase, f"who and where? {cause}")
            expect(cause.round or cause.phase in ("join", "setup"), f"in which round? {cause}")
            expect(cause.hint, f"what is to be done about {type(cause).__name__}: {cause}")
        return cls(error, causes, seconds)

    def names(self, engine: str, *kinds: type[WeightcastError]) -> WeightcastError:
        """The cause that an engine has, which is of one of these classes."""
        cause = self.causes.get(engine)
        wanted = " or ".join(kind.__name__ for kind in kinds)
        expect(isinstance(cause, kinds), f"not {wanted} for {engine}: {self.error}")
        assert cause is not None
        return cause

    def says_of(self, engine: str) -> str:
        """What the engine serves, as the error says: a version, "unknown" or "dirty"."""
        if not isinstance(self.error, RoundFailed):
            raise AssertionError(f"does not say who serves what: {self.error}")
        return "dirty" if engine in self.error.dirty else self.error.serving.get(engine, "nothing")

    @property
    def outcome(self) -> Finding:
        """The causes' classes."""
        return Finding(", ".join(sorted({type(cause).__name__ for cause in self.causes.values()})), self.seconds)


def forget_frames(error: BaseException) -> None:
    """The frames of an error keep what they used alive, which is no leak."""
    found: list[BaseException | None] = [error]
    seen: set[int] = set()
    while found:
        link = found.pop()
        if link is not None and id(link) not in seen:
            seen.add(id(link))
            link.__traceback__ = None
            found += [link.__cause__, link.__context__]
