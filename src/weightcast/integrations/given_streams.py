"""Streams that a framework hands over: one iterator a round, which gathers on all ranks and tidies up at its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import Any

import torch

from weightcast.report.model import Report
from weightcast.sources.streamed import DEFAULT_WINDOW_NBYTES, Stream, StreamSource
from weightcast.trainer.publisher import Publisher


class GivenStreams:
    """Publishes the iterators of a framework that tells nothing of their tensors beforehand.

    The first round keeps what it yields in host memory until that round is over, unless ``metadata`` tells names, types and shapes. Only
    the framework's sending rank has one of these.

    Args:
        engines: what a Publisher takes.
        wait_s: how long servers that are not there yet, or still load their model, are waited for.
        metadata, window_nbytes: as a StreamSource takes them.
        options: more arguments of Publisher.
    """

    def __init__(
        self,
        engines: Sequence[Any],
        *,
        wait_s: float = 600.0,
        metadata: Iterable[Any] | None = None,
        window_nbytes: int = DEFAULT_WINDOW_NBYTES,
        **options: Any,
    ) -> None:
        self.engines = list(engines)
        self._wait_s, self._metadata, self._window_nbytes = wait_s, metadata, window_nbytes
        self._options = {"process_group": None, **options}
        self._publisher: Publisher | None = None

    def publish(self, stream: Stream) -> Report:
        """Publish one round; raises RoundFailed where an engine does not serve it."""
        tensors = iter(stream)
        if self._publisher is None:
            if self._metadata is None:
                kept = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors}
                self._metadata = [(name, tensor.dtype, tensor.shape) for name, tensor in kept.items()]
                tensors = iter(kept.items())
            source = StreamSource(metadata=self._metadata, window_nbytes=self._window_nbytes)
            publisher = Publisher(source, self.engines, **self._options)
            try:
                publisher.connect(wait_s=self._wait_s)
            except BaseException:
                publisher.close()
                exhaust(tensors)
                raise
            self._publisher = publisher
        return publish_to_its_end(self._publisher, tensors)

    def serve_to(self, engines: Sequence[str]) -> None:
        """Have exactly these servers from the next round on."""
        wanted = list(engines)
        if self._publisher is not None:
            for engine in set(self.engines) - set(wanted):
                self._publisher.remove(engine)
            for engine in wanted:
                if engine not in self.engines:
                    self._publisher.add(engine)
        self.engines = wanted

    def close(self) -> None:
        """Leave the engines, which go on with what they serve. A later ``publish`` joins them again."""
        if self._publisher is not None:
            self._publisher.close()
            self._publisher = None


def publish_to_its_end(publisher: Publisher, tensors: Iterator[tuple[str, torch.Tensor]]) -> Report:
    """Publish what an iterator yields, and read it to its end even where the round fails: other ranks gather with this one, and
    adapters are un-merged behind the last tensor."""
    try:
        return publisher.publish(pair for pair in tensors)
    finally:
        exhaust(tensors)


def exhaust(stream: Stream) -> None:
    """Go on to the end and keep nothing, as ranks do that only gather."""
    for _ in stream:
        continue


async def publish_given(publisher: GivenStreams | None, weights: Stream | AsyncIterator[Any]) -> Report | None:
    """Publish a stream of either kind; without a publisher, only gather with the rank that has one.

    A plain iterator runs on this thread, which belongs to the trainer's device. An asynchronous one goes on running on this event loop
    while another thread publishes what it yields.
    """
    if not isinstance(weights, AsyncIterator):
        if publisher is not None:
            return publisher.publish(weights)
        exhaust(weights)
        return None
    if publisher is None:
        async for _ in weights:
            continue
        return None
    return await asyncio.to_thread(publisher.publish, _bridged(weights, asyncio.get_running_loop()))


def _bridged(weights: AsyncIterator[Any], loop: asyncio.AbstractEventLoop) -> Iterator[Any]:
    """What an asynchronous iterator yields, for a thread beside its event loop."""
    end = object()

    async def following() -> Any:
        return await anext(weights, end)

    while (item := asyncio.run_coroutine_threadsafe(following(), loop).result()) is not end:
        yield item
