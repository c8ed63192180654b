"""An update that a client of vLLM's own routes opened and never finished: the next trainer that joins by them may open its own.

vLLM's worker remembers that an update is open and refuses every other start until somebody finishes it; the client that died does not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

OPEN = "_weight_update_active"
CLOSES = "_weightcast_closes"


def close_when_joined(is_ours: Callable[[Any], bool]) -> None:
    """Have this process's worker forget an open update before a trainer joins. A second call does nothing. ``is_ours`` is called with
    the worker; workers of other backends stay as they are."""
    from vllm.v1.worker.gpu_worker import Worker

    join = getattr(Worker, "init_weight_transfer_engine", None)
    if join is None or hasattr(join, CLOSES):
        return

    @wraps(join)
    def joined(worker: Any, *args: Any, **kwargs: Any) -> Any:
        engine = getattr(worker, "weight_transfer_engine", None)
        if is_ours(worker) and getattr(worker, OPEN, False):
            setattr(worker, OPEN, False)
            reset = getattr(engine, "reset_weight_update_target", None)
            if reset is not None:
                reset()
        return join(worker, *args, **kwargs)

    setattr(joined, CLOSES, True)
    Worker.init_weight_transfer_engine = joined
