"""The order of a commit, as a state machine without I/O: it asks for one step after the other, and a shell carries them out.

    asleep       an engine that sleeps is refused before any worker is touched
    standing     does the engine compute? If not: is the pause weightcast's, or somebody else's?
    pause        as the order says; always where caches are cleared, where several workers change together, where the engine is held
    apply        the round goes live in every worker, or is taken back
    take_back    where some workers could not carry a commit out, or what follows it failed, all return to the version before
    forget       keys and values that the former weights computed, unless the pause dropped them
    name         outputs carry the version that every worker said it serves, never one that was only asked for
    serving      what do the workers serve? Asked only where that is not known
    hold         weights of no version, or of several: nothing is computed until an order heals them
    resume       the end of the order's own pause, or of a hold that was healed

Load-bearing: a pause of somebody else's stays as it was. A pause that weightcast made is ended or becomes a hold, in every order,
also in one that failed; when neither works, the next order does it (``owes``). A step that is ``owed`` is carried out also when
the order's time is up. A failure before ``apply`` has changed nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from weightcast.commit.order import RoundAnswer, RoundOrder, Serving, Standing
from weightcast.errors import EngineError, StateError, WeightcastError

logger = logging.getLogger(__name__)


class Step(Enum):
    """One thing that an engine is asked for. The value is the name of a port's method."""

    ASLEEP = "asleep"
    STANDING = "standing"
    PAUSE = "pause"
    APPLY = "apply"
    TAKE_BACK = "take_back"
    FORGET = "forget"
    NAME = "name"
    SERVING = "serving"
    HOLD = "hold"
    RESUME = "resume"

    @property
    def phase(self) -> str:
        """The phase of a round's report that the step counts to."""
        if self in (Step.ASLEEP, Step.STANDING, Step.PAUSE):
            return "pause"
        return "resume" if self in (Step.SERVING, Step.HOLD, Step.RESUME) else "apply"

    @property
    def runs_to_its_end(self) -> bool:
        """Whether nobody gives the step up at a deadline: an update without its finish would block every later one."""
        return self in (Step.APPLY, Step.TAKE_BACK)


@dataclass(frozen=True, slots=True, kw_only=True)
class Do:
    """Carry out a step, with these arguments; ``what`` names it in errors."""

    step: Step
    arguments: tuple[Any, ...] = ()
    what: str
    owed: bool = False
    hint: str | None = None


Steps = Generator[Do, Any, RoundAnswer]
"""Sent the result of each step, or thrown its error."""


class Orders:
    """The orders of one engine. They are carried out one at a time."""

    def __init__(self) -> None:
        self.owes = False
        """The engine was paused here and was neither let go on nor held."""
        self.last: tuple[RoundOrder, RoundAnswer] | None = None
        self.last_error: str | None = None

    def steps(self, order: RoundOrder, phases: dict[str, float]) -> Steps:
        """All steps of an order. ``phases`` holds the seconds of the steps so far, by phase."""
        repeated = yield from self._repeated(order)
        if repeated is not None:
            return repeated
        try:
            version = yield from _Round(self, order).steps()
        except WeightcastError as error:
            self.last_error = str(error.at(round=order.round))
            raise
        answer = RoundAnswer(version=version, phases={name: phases.get(name, 0.0) for name in _PHASES})
        self.last, self.last_error = (order, answer), None
        return answer

    def _repeated(self, order: RoundOrder) -> Generator[Do, Any, RoundAnswer | None]:
        """The answer that was given to this very order, as long as it still holds."""
        if self.last is None or self.owes or not order.same_as(self.last[0]):
            return None
        serving: Serving = yield Do(step=Step.SERVING, what="asking what is served")
        answer = self.last[1]
        return answer if not serving.unfit and serving.version == answer.version else None


_PHASES = ("pause", "apply", "resume")


class _Round:
    """One order on its way."""

    def __init__(self, orders: Orders, order: RoundOrder) -> None:
        self._orders, self._order = orders, order
        self._standing = Standing(paused=False)
        self._began = False
        self._serving: Serving | None = None
        """What the workers said last; None when that is not known."""

    def steps(self) -> Generator[Do, Any, str]:
        reason = yield Do(step=Step.ASLEEP, what="asking whether the engine is asleep")
        if reason:
            raise StateError(f"the engine is asleep: {reason}", hint="Wake it up, then publish again")
        self._standing = yield Do(step=Step.STANDING, what="asking whether the engine is paused")
        self._orders.owes = self._orders.owes and self._standing.paused
        try:
            forgotten = yield from self._pause()
            yield from self._change(forgotten)
        except GeneratorExit:
            raise
        except BaseException as error:
            yield from self._let_go_on(error)
            raise
        yield from self._let_go_on(None)
        return self._version()

    @property
    def _is_theirs(self) -> bool:
        """Whether somebody else than weightcast paused the engine."""
        return self._standing.paused and not (self._standing.held or self._orders.owes)

    def _pause(self) -> Generator[Do, Any, bool]:
        """Returns whether cached keys and values are forgotten with that."""
        order, standing = self._order, self._standing
        # Without a pause a step could come in between the change and the cleaning of caches, or between two workers' changes.
        clears_late = order.clear_cache and not standing.in_one_step
        needed = clears_late or standing.must_pause or (standing.paused and not self._is_theirs)
        spared = ("none", "keep") if standing.in_one_step else ("none",)
        if order.pause in spared and not needed:
            return standing.in_one_step
        mode = "keep" if order.pause == "none" else order.pause
        self._orders.owes = not self._is_theirs
        yield Do(
            step=Step.PAUSE,
            arguments=(mode, order.clear_cache),
            what=f"pausing (mode {mode})",
            hint="Nothing was changed. Mode wait takes as long as the longest request; keep takes one step",
        )
        return order.clear_cache and (standing.pause_forgets or standing.in_one_step)

    def _change(self, forgotten: bool) -> Generator[Do, Any, None]:
        order = self._order
        self._began = True
        serving = self._serving = yield Do(step=Step.APPLY, arguments=(order,), what=f"the {order.action}")
        if serving.error is not None:
            if order.action == "commit" and serving.partly:
                yield from self._take_back()
            raise serving.error
        try:
            if order.clear_cache and not forgotten:
                yield Do(step=Step.FORGET, what="forgetting keys and values", owed=True)
            if not serving.unfit:
                yield Do(step=Step.NAME, arguments=(self._version(),), what="naming the version", owed=True)
        except WeightcastError:
            if order.action == "commit":
                yield from self._take_back()
            raise

    def _take_back(self) -> Generator[Do, Any, None]:
        """Whether this works is seen from what the workers serve afterwards; the error to tell is the one before it."""
        self._serving = None
        try:
            self._serving = yield Do(
                step=Step.TAKE_BACK, arguments=(self._order,), what="taking the commit back", owed=True
            )
        except WeightcastError as error:
            logger.warning("round %d: a commit could not be taken back: %s", self._order.round, error)

    def _let_go_on(self, failure: BaseException | None) -> Generator[Do, Any, None]:
        """End the order's pause, unless it is somebody else's, or hold the engine. After a failure this raises nothing new."""
        try:
            if self._began or self._standing.paused:
                yield from self._settle(failure)
            elif self._orders.owes:
                yield _resume(was_held=False)
            self._orders.owes = False
        except WeightcastError as error:
            if failure is None:
                raise
            logger.warning("what the engine serves is not known, so it stays as it is: %s", error)

    def _settle(self, failure: BaseException | None) -> Generator[Do, Any, None]:
        if self._serving is None:
            self._serving = yield Do(step=Step.SERVING, what="asking what is served", owed=True)
        serving = self._serving
        if serving.unfit:
            if not self._is_theirs:
                logger.error("%s: nothing is computed until an update succeeds", serving.unfit)
                reason = f"the engine is held: {serving.unfit}"
                yield Do(step=Step.HOLD, arguments=(reason,), what="holding the engine", owed=True)
            return
        if failure is not None and self._began:
            yield Do(step=Step.NAME, arguments=(self._version(),), what="naming the version", owed=True)
        if not self._is_theirs and (self._orders.owes or serving.held):
            yield _resume(was_held=serving.held)

    def _version(self) -> str:
        """What all workers serve, which a commit has made the version that was ordered."""
        assert self._serving is not None
        version = self._serving.version
        if version is None:
            raise EngineError(self._serving.unfit, hint="Publish again")
        return version


def _resume(*, was_held: bool) -> Do:
    return Do(step=Step.RESUME, arguments=(was_held,), what="resuming generation", owed=True)
