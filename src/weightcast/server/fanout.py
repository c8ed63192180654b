"""Running a request's prompts in the engine at once, and giving up on them when the caller does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, TypeVar, cast

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from weightcast.engines.base import RequestOutput
from weightcast.errors import EngineError

T = TypeVar("T")


class Fanout:
    """The outputs of several prompts as they come, newest per prompt.

    Outputs are cumulative, so a slow reader skips intermediate ones and memory stays bounded. Leaving the context closes
    every engine iterator, which aborts what still runs; it returns only when that has happened.
    """

    def __init__(self, starts: Sequence[Callable[[], AsyncIterator[RequestOutput]]]) -> None:
        self._starts = starts
        self._latest: dict[int, RequestOutput] = {}
        self._news = asyncio.Event()
        self._running = len(starts)
        self._error: BaseException | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Fanout:
        self._tasks = [asyncio.create_task(self._drain(index, start)) for index, start in enumerate(self._starts)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def next(self) -> list[tuple[int, RequestOutput]]:
        """What changed since the last call, by prompt; empty when all prompts are finished. Raises their first error."""
        while True:
            if self._error is not None:
                raise self._error
            if self._latest:
                changed = sorted(self._latest.items())
                self._latest.clear()
                return changed
            if self._running == 0:
                return []
            self._news.clear()
            await self._news.wait()

    async def last(self) -> list[RequestOutput]:
        """Wait for all prompts; their final outputs in order."""
        final: dict[int, RequestOutput] = {}
        while changed := await self.next():
            final.update(changed)
        return [final[index] for index in range(len(self._starts))]

    async def _drain(self, index: int, start: Callable[[], AsyncIterator[RequestOutput]]) -> None:
        """Whatever the engine raises is for the reader, who raises it from ``next``."""
        output = None
        try:
            async with aclosing(cast("AsyncGenerator[RequestOutput, None]", start())) as outputs:
                async for output in outputs:
                    self._latest[index] = output
                    self._news.set()
            if output is None or not output.finished:
                raise EngineError("the engine ended a request without finishing it")
            if output.error is not None:
                raise EngineError(output.error)
        except Exception as error:  # noqa: BLE001
            self._error = self._error or error
        finally:
            self._running -= 1
            self._news.set()


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run ``work`` to its end; if the client goes first, cancel it, wait until it has ended and raise ClientDisconnect.

    The request's body must have been read.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        for pending in (task, gone):
            pending.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
