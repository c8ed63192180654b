"""Updates of workers that stand at the same place between the same two steps, and can hear of each other there.

An engine whose tensor-parallel ranks take their orders from one stream of messages needs no pause for a commit: each rank carries the
order out, the ranks compare what it came to, and where one failed the others take it back, all before the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from weightcast.commit.order import Serving
from weightcast.commit.worker_outcome import outcomes_from

Call = Callable[[str, Mapping[str, Any]], dict[str, Any]]
Gather = Callable[[dict[str, Any]], list[dict[str, Any]]]


def update_in_lockstep(call: Call, info: Mapping[str, Any], gather: Gather) -> list[dict[str, Any]]:
    """Carry out an update in this rank, and take a commit back where only some ranks could carry it out; the outcomes of all ranks.

    Every rank calls this at the same place in its stream of orders. ``call`` is StockWorker.call. ``gather`` exchanges one record of
    each rank, a collective call of the engine's own group, and returns the records of all ranks to each of them. Neither raises.
    After a commit was taken back, each outcome says what its rank serves now, and still has the error that the rank failed with.
    """
    outcomes = outcomes_from(gather(call("update", info)))
    if info.get("action") == "commit" and Serving.of(outcomes).partly:
        back = {name: value for name, value in info.items() if name != "version"} | {"action": "rollback"}
        after = outcomes_from(gather(call("update", back)))
        outcomes = [
            msgspec.structs.replace(now, error=before.error or now.error)
            for before, now in zip(outcomes, after, strict=True)
        ]
    return [msgspec.to_builtins(outcome) for outcome in outcomes]
