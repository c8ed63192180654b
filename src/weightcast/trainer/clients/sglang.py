"""SglangClient: calls an ``sglang.Engine`` of this process. Nothing of SGLang is imported: its plug-in has left what is called."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from concurrent.futures import TimeoutError as WaitTimeout
from contextlib import suppress
from typing import Any

from weightcast.commit.stock import StockEngine
from weightcast.deadline import Deadline
from weightcast.errors import Unsupported
from weightcast.trainer.clients.in_loop import LoopCalls, blocks_a_loop, running_loop
from weightcast.trainer.clients.stock import StockClient

LOOK_S = 0.01

_numbers = itertools.count()


def is_sglang(engine: Any) -> bool:
    """Whether the object is an ``sglang.Engine``, by what it has."""
    return hasattr(engine, "tokenizer_manager") and hasattr(engine, "loop")


class SglangClient(StockClient):
    """Calls an engine object. Requests of other threads may be in flight meanwhile."""

    kind = "sglang"

    def __init__(self, engine: Any) -> None:
        stock = getattr(engine.tokenizer_manager, "weightcast", None)
        if not isinstance(stock, StockEngine):
            raise Unsupported(
                "this sglang.Engine has loaded no plug-in of weightcast's",
                hint="SGLANG_PLUGINS, if it is set, has to name weightcast; SGLang's log says what went wrong otherwise",
            )
        name = f"sglang-{next(_numbers)}"
        super().__init__(stock, _DrivenLoop(engine.loop, name), name, engine)


class _DrivenLoop(LoopCalls):
    """Calls on an event loop that runs only while somebody waits for a call: a call of the engine's own, or one made here."""

    def __init__(self, loop: asyncio.AbstractEventLoop, name: str) -> None:
        super().__init__(loop, name)
        self._turn = threading.Lock()

    def run(self, work: Coroutine[Any, Any, Any], deadline: Deadline) -> Any:
        """Wait for ``work``, and have the loop run meanwhile where nobody else does."""
        if running_loop() is not None:
            work.close()
            raise blocks_a_loop("this would block the event loop that runs on this thread", self._name)
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        while not future.done():
            if deadline.remaining_s() <= 0:
                future.cancel()
                raise deadline.exceeded("the call to the engine", engine=self._name)
            with suppress(WaitTimeout):
                self._drive(future, deadline)
                future.exception(timeout=LOOK_S)
        return future.result()

    def _drive(self, future: Future[Any], deadline: Deadline) -> None:
        if not self._turn.acquire(blocking=False):
            return
        try:
            if not self._loop.is_running():
                with suppress(RuntimeError):  # another thread was faster
                    self._loop.run_until_complete(_until(future, deadline.remaining_s()))
        finally:
            self._turn.release()


async def _until(future: Future[Any], timeout_s: float) -> None:
    await asyncio.wait({asyncio.wrap_future(future)}, timeout=timeout_s)
