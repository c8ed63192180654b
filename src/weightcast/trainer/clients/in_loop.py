"""Clients for asynchronous engines of this process: their calls run on the engine's event loop, the Publisher on another thread."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Coroutine, Mapping
from typing import Any

from weightcast.deadline import Deadline, result_within
from weightcast.errors import DeadlineExceeded, StateError
from weightcast.trainer.clients.base import CommitOrder, CommitReply, EngineClient

_numbers = itertools.count()


class LoopCalls:
    """Runs an engine's coroutines on its event loop, each within a deadline."""

    def __init__(self, loop: asyncio.AbstractEventLoop, name: str) -> None:
        self._loop, self._name = loop, name

    def run(self, work: Coroutine[Any, Any, Any], deadline: Deadline) -> Any:
        """Wait for ``work``; StateError on the loop's own thread, which would wait for itself."""
        if _running_loop() is self._loop:
            work.close()
            raise StateError(
                "this would block the event loop that the engine runs on",
                hint="await asyncio.to_thread(publisher.publish)",
            )
        future = asyncio.run_coroutine_threadsafe(work, self._loop)

        def late() -> DeadlineExceeded:
            future.cancel()
            return DeadlineExceeded(
                f"the engine took longer than {deadline.timeout_s:g} s",
                engine=self._name,
                hint="A publisher on the engine's own event loop blocks it: await asyncio.to_thread(publisher.publish)",
            )

        return result_within(future, deadline, late)


class AsyncEngineClient(EngineClient):
    """weightcast's ``AsyncLLM``, or any engine with vLLM's names for pausing and weight transfer."""

    kind = "in-process"
    host = "127.0.0.1"

    def __init__(self, engine: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._engine = engine
        self.name = f"async-{next(_numbers)}"
        self._calls = LoopCalls(loop, self.name)

    def world_size(self, deadline: Deadline) -> int:
        return int(self._calls.run(self._engine.get_world_size(), deadline))

    def init(self, init_info: Mapping[str, Any], deadline: Deadline) -> None:
        self._calls.run(self._engine.init_weight_transfer_engine({"init_info": dict(init_info)}), deadline)

    def commit(self, order: CommitOrder, deadline: Deadline) -> CommitReply:
        return self._round("commit", order, deadline)

    def rollback(self, epoch: int, round: int, deadline: Deadline) -> None:
        self._round("rollback", CommitOrder(epoch=epoch, round=round, version=""), deadline)

    def status(self, deadline: Deadline) -> Mapping[str, Any]:
        status = self._calls.run(self._engine.status(), deadline)
        return {
            "weight_version": status.weight_version,
            "digest": status.digest,
            "dirty": status.dirty,
            "ready": status.ready,
        }

    def shutdown(self, deadline: Deadline) -> None:
        self._calls.run(self._engine.shutdown_weight_transfer_engine(), deadline)

    def _round(self, action: str, order: CommitOrder, deadline: Deadline) -> CommitReply:
        """Pause, update, resume. An engine with weights of no version refuses to step by itself."""
        start = time.perf_counter()
        run, engine = self._calls.run, self._engine
        pauses = order.pause != "none" and not run(engine.is_paused(), deadline)
        if pauses:
            run(engine.pause_generation(order.pause, order.clear_cache), deadline)
        at_rest = time.perf_counter()
        try:
            self._update(action, order, deadline)
            if order.clear_cache and not pauses:
                run(engine.reset_prefix_cache(reset_running_requests=True), deadline)
            applied = time.perf_counter()
        finally:
            if pauses:
                run(engine.resume_generation(), _at_least(deadline))
        end = time.perf_counter()
        return CommitReply(phases={"pause": at_rest - start, "apply": applied - at_rest, "resume": end - applied})

    def _update(self, action: str, order: CommitOrder, deadline: Deadline) -> None:
        run, engine = self._calls.run, self._engine
        left_s = deadline.limit_s()
        info = {"epoch": order.epoch, "round": order.round, "action": action, "timeout_s": left_s}
        run(engine.start_weight_update(), deadline)
        run(engine.update_weights({"update_info": info}), deadline)
        run(engine.finish_weight_update(order.version or None), deadline)


def _at_least(deadline: Deadline) -> Deadline:
    """Resuming is owed to the engine's users also when the round's time is up."""
    return Deadline(max(deadline.remaining_s(), 1.0))


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
