"""Orders to engines of this process: what a client is asked for, in the form that carries a commit out (see commit)."""

from __future__ import annotations

from typing import Any

from weightcast.commit.order import RoundOrder, commit_pause
from weightcast.deadline import Deadline
from weightcast.errors import EngineError
from weightcast.trainer.clients.base import CommitOrder


def round_order(order: CommitOrder, deadline: Deadline, adapter: str = "") -> RoundOrder:
    """A commit, as engines of this process are ordered it."""
    return RoundOrder(
        action="commit",
        epoch=order.epoch,
        round=order.round,
        version=order.version,
        pause=commit_pause(order.pause),
        clear_cache=order.clear_cache,
        timeout_s=deadline.limit_s(),
        adapter=adapter,
    )


def told_of(status: Any, adapter: str) -> dict[str, Any]:
    """What an engine object's status says of the model, or of an adapter, as a trainer reads it."""
    served = status.adapters.get(adapter) if adapter else status
    if served is None:
        raise EngineError(f"the engine has no adapter {adapter!r}")
    return {name: getattr(served, name) for name in ("weight_version", "digest", "dirty", "ready")}


def way_back(epoch: int, round: int, deadline: Deadline, adapter: str = "") -> RoundOrder:
    """The order to take a round back."""
    return RoundOrder(action="rollback", epoch=epoch, round=round, timeout_s=deadline.limit_s(), adapter=adapter)
