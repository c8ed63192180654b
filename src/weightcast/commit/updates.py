"""Start, update and finish, as one call that runs to its end, of engines that have these under vLLM's names.

Load-bearing: an update without its finish blocks every later one, so whatever fails, the round is closed; and one that somebody
else left open, who will not come back, is closed first.
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from typing import Any

from weightcast.commit.order import RoundOrder
from weightcast.deadline import Deadline
from weightcast.errors import EngineError, StateError, WeightcastError

logger = logging.getLogger(__name__)

Call = tuple[str, tuple[Any, ...]]
Calls = Generator[Call, Any, None]
"""Names of the engine's methods and their arguments; thrown the error of a call that fails."""


def update_info(order: RoundOrder, deadline: Deadline) -> dict[str, Any]:
    """What an update tells the backend."""
    info: dict[str, Any] = {
        "action": order.action,
        "epoch": order.epoch,
        "round": order.round,
        "timeout_s": deadline.limit_s(),
    }
    return {**info, "version": order.version} if order.version else info


def update_calls(info: dict[str, Any], version: str | None) -> Calls:
    """One round of the weight-transfer contract. An engine whose round is open already gets it closed: its client is gone, or
    does without the round, since the trainer that the engine joined gives the orders."""
    try:
        yield "start_weight_update", ()
    except StateError:
        yield from _close(version)
        yield "start_weight_update", ()
    try:
        yield "update_weights", (info,)
        yield "finish_weight_update", (version,)
    except Exception:
        yield from _close(version)
        raise


def _close(version: str | None) -> Calls:
    """Close an open round. An engine closes the round of a failed update by itself, and then says that none is open."""
    try:
        yield "finish_weight_update", (version,)
    except Exception as error:  # noqa: BLE001 - the error to tell is the one before it
        logger.debug("the round was closed already: %s", error)


async def call(engine: Any, calls: Calls) -> None:
    """Make these calls of an asynchronous engine."""
    advance = calls.__next__
    while True:
        try:
            name, arguments = advance()
        except StopIteration:
            return
        try:
            await getattr(engine, name)(*arguments)
        except Exception as error:  # noqa: BLE001 - the calls decide what an error leads to
            advance = _throw(calls, error)
        else:
            advance = calls.__next__


def call_now(engine: Any, calls: Calls) -> None:
    """Make these calls of a synchronous engine."""
    advance = calls.__next__
    while True:
        try:
            name, arguments = advance()
        except StopIteration:
            return
        try:
            getattr(engine, name)(*arguments)
        except Exception as error:  # noqa: BLE001 - the calls decide what an error leads to
            advance = _throw(calls, error)
        else:
            advance = calls.__next__


def _throw(calls: Calls, error: Exception) -> Any:
    return lambda: calls.throw(error)


def named(error: Exception) -> WeightcastError:
    """The error, as one of weightcast's."""
    if isinstance(error, WeightcastError):
        return error
    logger.error("the engine raised", exc_info=error)
    found = EngineError(f"the engine raised {type(error).__name__}: {error}")
    found.__cause__ = error
    return found
