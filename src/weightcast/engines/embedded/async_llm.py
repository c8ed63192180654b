"""AsyncLLM: the embedded engine behind an event loop; implements engines.base.InferenceEngine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from weightcast.engines.base import (
    EngineStatus,
    LiveDigests,
    PauseMode,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
)
from weightcast.engines.embedded.config import EngineConfig
from weightcast.engines.embedded.engine import Engine
from weightcast.engines.embedded.sequence import Request
from weightcast.errors import DeadlineExceeded, EngineError
from weightcast.manifest import Manifest

T = TypeVar("T")
_LIVENESS_CHECK_S = 1.0
_SHORT_PROMPT = 4096
"""Characters or token ids that are looked at in about a millisecond."""


class AsyncLLM:
    """A model that serves many requests at once and takes new weights while it does. Takes the arguments of EngineConfig.

    Making an AsyncLLM loads the model and blocks; do that before the event loop is busy. Call ``shutdown`` at the end.
    """

    def __init__(self, model: Any, **arguments: Any) -> None:
        self.engine = Engine(EngineConfig(model=model, **arguments))
        self._timeout_s = self.engine.config.call_timeout_s

    @property
    def model_name(self) -> str:
        return self.engine.model_name

    @property
    def max_model_len(self) -> int:
        return self.engine.max_model_len

    @property
    def dtype(self) -> str:
        """The type that the model computes in. For "auto" this is the type that the engine chose."""
        return self.engine.dtype

    @property
    def tokenizer(self) -> Any:
        return self.engine.text.tokenizer

    def generate(
        self,
        prompt: str | Sequence[int] | Mapping[str, Any],
        sampling_params: SamplingParams,
        request_id: str | None = None,
        *,
        adapter: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield outputs that hold everything so far, the last of them finished (with FINAL_ONLY that one alone). Closing the iterator
        early aborts the request.

        The iterator's first step raises InvalidInput, and StateError when the engine is not ready or its queue is full. A slow reader
        misses outputs in between, and never the last one. ``adapter`` is the LoRA adapter to run on: its name, or name@version.
        """
        latest = _Latest(asyncio.get_running_loop())
        stream = sampling_params.output_kind is RequestOutputKind.CUMULATIVE
        make = partial(
            self.engine.request,
            prompt,
            sampling_params,
            latest.put,
            request_id=request_id,
            stream=stream,
            adapter=adapter,
        )
        # Tokens of a long text and a grammar take a while to make; the event loop goes on meanwhile.
        short = isinstance(prompt, str | Sequence) and len(prompt) <= _SHORT_PROMPT
        takes_long = not short or sampling_params.structured_outputs is not None
        return self._stream(make, latest, takes_long=takes_long)

    async def run_between_steps(self, command: Callable[[], T]) -> T:
        """Run ``command`` on the engine's thread between two forward passes and return its result."""
        return await self._wait(self.engine.run_between_steps(command))

    async def abort(self, request_ids: Sequence[str] | None = None) -> int:
        return await self._wait(self.engine.abort(request_ids))

    async def pause_generation(self, mode: PauseMode = "abort", clear_cache: bool = True) -> None:
        still = await self._wait(self.engine.pause(mode, clear_cache))
        await self._wait(still)

    async def resume_generation(self) -> None:
        await self._wait(self.engine.resume())

    async def is_paused(self) -> bool:
        return self.engine.paused

    async def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        return await self._wait(self.engine.reset_cache(reset_running_requests))

    async def init_weight_transfer_engine(self, init_info: Any) -> None:
        await self._wait(self.engine.init_transfer(init_info))

    async def start_weight_update(self) -> None:
        await self._wait(self.engine.start_update())

    async def update_weights(self, update_info: Any) -> None:
        await self._wait(self.engine.update(update_info))

    async def finish_weight_update(self, weight_version: str | None = None) -> None:
        await self._wait(self.engine.finish_update(weight_version))

    async def shutdown_weight_transfer_engine(self) -> None:
        await self._wait(self.engine.shutdown_transfer())

    @property
    def adapter_names(self) -> list[str]:
        return self.engine.adapter_names

    @property
    def joined_adapters(self) -> list[str]:
        return self.engine.joined_adapters

    async def update_adapter(self, name: str, update_info: Mapping[str, Any]) -> None:
        await self._wait(self.engine.update_adapter(name, update_info))

    async def remove_adapter(self, name: str) -> None:
        await self._wait(self.engine.remove_adapter(name))

    async def get_world_size(self, include_dp: bool = True) -> int:
        return 1

    async def get_weight_version(self) -> str:
        return self.engine.weight_version

    async def update_weight_version(self, new_version: str) -> None:
        await self._wait(self.engine.set_version(new_version))

    async def checksums(self) -> dict[str, str]:
        return await self._wait(self.engine.checksums())

    async def tensor_digests(self, manifest: Manifest) -> LiveDigests:
        return await self._wait(self.engine.tensor_digests(manifest))

    async def status(self) -> EngineStatus:
        return self.engine.status()

    async def shutdown(self) -> None:
        await asyncio.to_thread(self.engine.shutdown)

    async def _stream(
        self, make: Callable[[], Request], latest: _Latest, *, takes_long: bool
    ) -> AsyncGenerator[RequestOutput, None]:
        finished = False
        request = await asyncio.to_thread(make) if takes_long else make()
        try:
            await self._wait(self.engine.submit([request]))
            while not finished:
                output = await self._next(latest)
                finished = output.finished
                yield output
        finally:
            if not finished:
                self.engine.cancel([request])

    async def _next(self, latest: _Latest) -> RequestOutput:
        while True:
            output = await latest.get(_LIVENESS_CHECK_S)
            if output is not None:
                return output
            if not self.engine.alive:
                raise EngineError(self.engine.status().reason)

    async def _wait(self, future: Future[T]) -> T:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            if future.done() and not future.cancelled():
                raise
            raise DeadlineExceeded(f"the engine did not answer within {self._timeout_s:g} s") from None


class _Latest:
    """Hands the newest output from the engine's thread to one reader on an event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._event = asyncio.Event()
        self._output: RequestOutput | None = None

    def put(self, output: RequestOutput) -> None:
        """Called on the engine's thread. A loop that is closed has no reader any more."""
        try:
            self._loop.call_soon_threadsafe(self._take, output)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    async def get(self, timeout_s: float) -> RequestOutput | None:
        """The newest output that was not read yet; None when there is none for so long."""
        if not self._event.is_set():
            try:
                async with asyncio.timeout(
                    timeout_s
                ):  # wait_for of Python 3.11 loses a cancellation that meets an output
                    await self._event.wait()
            except TimeoutError:
                return None
        self._event.clear()
        return self._output

    def _take(self, output: RequestOutput) -> None:
        self._output = output
        self._event.set()
