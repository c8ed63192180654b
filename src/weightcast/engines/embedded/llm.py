"""LLM: the embedded engine for scripts; every call returns when it is done. Names and shapes follow vLLM's LLM."""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, TypeVar

from weightcast.deadline import Deadline
from weightcast.engines.base import EngineStatus, LiveDigests, PauseMode, RequestOutput, SamplingParams
from weightcast.engines.embedded.config import EngineConfig
from weightcast.engines.embedded.engine import Engine
from weightcast.errors import DeadlineExceeded, EngineError, InvalidInput
from weightcast.manifest import Manifest

T = TypeVar("T")
_LIVENESS_CHECK_S = 1.0


class LLM:
    """A model that generates in this process and takes new weights between two forward passes. Takes the arguments of EngineConfig.

    Use an LLM as a context manager, or call ``shutdown``; otherwise the LLM ends with the interpreter. Several threads may call an LLM:
    one thread may pause and update while another is inside ``generate``.
    """

    def __init__(self, model: Any, **arguments: Any) -> None:
        self.engine = Engine(EngineConfig(model=model, **arguments))
        self._timeout_s = self.engine.config.call_timeout_s

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    @property
    def model_name(self) -> str:
        return self.engine.model_name

    @property
    def max_model_len(self) -> int:
        return self.engine.max_model_len

    def get_tokenizer(self) -> Any:
        """Return the transformers tokenizer, or None."""
        return self.engine.text.tokenizer

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | None = None,
        use_tqdm: bool = False,
        timeout_s: float = 86400.0,
    ) -> list[RequestOutput]:
        """Finish all prompts and return their outputs in order.

        ``prompts`` is a text, a list of token ids, ``{"prompt": ...}``, ``{"prompt_token_ids": ...}``, or a list of these.
        ``sampling_params`` is one object for all prompts, or one for each. ``adapter`` is the LoRA adapter to run on: its name, or
        name@version; UnknownModel where that is not served. ``use_tqdm`` is accepted and ignored. Raises EngineError when
        the engine ended a request with an error, and DeadlineExceeded, after aborting the requests, when the time is up.
        """
        items = _prompt_list(prompts)
        return self._generate(items, _params_list(sampling_params, len(items)), Deadline(timeout_s), adapter)

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | None = None,
        use_tqdm: bool = False,
        timeout_s: float = 86400.0,
        **template: Any,
    ) -> list[RequestOutput]:
        """Do what ``generate`` does, for one conversation or a list of conversations. ``template`` is passed to the chat template."""
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations = messages if several else [messages]
        prompts = [{"prompt_token_ids": self.engine.text.chat(each, **template)} for each in conversations]
        return self._generate(prompts, _params_list(sampling_params, len(prompts)), Deadline(timeout_s), adapter)

    def abort(self, request_ids: Sequence[str] | None = None) -> int:
        """Abort some or all requests; their outputs end with finish_reason "abort"."""
        return self._wait(self.engine.abort(request_ids))

    def run_between_steps(self, command: Callable[[], T]) -> T:
        """Run ``command`` on the engine's thread between two forward passes and return its result."""
        return self._wait(self.engine.run_between_steps(command))

    def pause_generation(self, mode: PauseMode = "abort", clear_cache: bool = True) -> None:
        """Stop the engine's steps, as ``InferenceEngine.pause_generation`` says."""
        deadline = Deadline(self._timeout_s)
        still = self._wait(self.engine.pause(mode, clear_cache), deadline)
        self._wait(still, deadline)

    def resume_generation(self) -> None:
        self._wait(self.engine.resume())

    def is_paused(self) -> bool:
        return self.engine.paused

    def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        return self._wait(self.engine.reset_cache(reset_running_requests))

    def init_weight_transfer_engine(self, init_info: Any) -> None:
        """Join a trainer. Takes ``{"init_info": {...}}``, an object with ``init_info``, or the inner mapping."""
        self._wait(self.engine.init_transfer(init_info))

    def start_weight_update(self) -> None:
        self._wait(self.engine.start_update())

    def update_weights(self, update_info: Any) -> None:
        """Receive weights. Takes ``{"update_info": {...}}``, an object with ``update_info``, or the inner value."""
        self._wait(self.engine.update(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """End the round. Outputs carry the new version from here on."""
        self._wait(self.engine.finish_update(weight_version))

    def shutdown_weight_transfer_engine(self) -> None:
        self._wait(self.engine.shutdown_transfer())

    @property
    def adapter_names(self) -> list[str]:
        """The names of adapters of which a version is live."""
        return self.engine.adapter_names

    def update_adapter(self, name: str, update_info: Any) -> None:
        """Make a round of an adapter live, or take it back. Nothing else of the engine is touched."""
        self._wait(self.engine.update_adapter(name, update_info))

    def remove_adapter(self, name: str) -> None:
        """Serve an adapter no more; requests that run on it end as they would have."""
        self._wait(self.engine.remove_adapter(name))

    def get_world_size(self, include_dp: bool = True) -> int:
        return 1

    def get_weight_version(self) -> str:
        return self.engine.weight_version

    def update_weight_version(self, new_version: str) -> None:
        """Set the version that outputs carry. No weight is touched."""
        self._wait(self.engine.set_version(new_version))

    def checksums(self) -> dict[str, str]:
        return self._wait(self.engine.checksums())

    def tensor_digests(self, manifest: Manifest) -> LiveDigests:
        """Digest the live values of each tensor of a checkpoint, as ``DigestsTensors`` says."""
        return self._wait(self.engine.tensor_digests(manifest))

    def status(self) -> EngineStatus:
        return self.engine.status()

    def shutdown(self) -> None:
        """End all requests and the engine. A second call does nothing."""
        self.engine.shutdown()

    def _generate(
        self, prompts: Sequence[Any], params: Sequence[SamplingParams], deadline: Deadline, adapter: str | None
    ) -> list[RequestOutput]:
        done: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
        requests = [
            self.engine.request(prompt, param, done.put, stream=False, bounded=False, adapter=adapter)
            for prompt, param in zip(prompts, params, strict=True)
        ]
        names = [request.request_id for request in requests]
        outputs: dict[str, RequestOutput] = {}
        try:
            self._wait(self.engine.submit(requests), deadline)
            while len(outputs) < len(names):
                output = self._next(done, deadline)
                outputs[output.request_id] = output
                if output.error is not None:
                    raise EngineError(output.error)
        finally:
            unfinished = [request for request in requests if request.request_id not in outputs]
            if unfinished:
                self.engine.cancel(unfinished)
        return [outputs[name] for name in names]

    def _next(self, done: queue.SimpleQueue[RequestOutput], deadline: Deadline) -> RequestOutput:
        while True:
            try:
                return done.get(timeout=min(_LIVENESS_CHECK_S, deadline.limit_s()))
            except queue.Empty:
                deadline.check("generate")
                if not self.engine.alive and done.empty():
                    raise EngineError(self.engine.status().reason) from None

    def _wait(self, future: Future[T], deadline: Deadline | None = None) -> T:
        timeout_s = self._timeout_s if deadline is None else deadline.remaining_s()
        try:
            return future.result(timeout_s)
        except TimeoutError:
            if future.done():
                raise
            raise DeadlineExceeded(f"the engine did not answer within {timeout_s:g} s") from None


def _prompt_list(prompts: Any) -> list[Any]:
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise InvalidInput(f"prompts is a text or a list, not {type(prompts).__name__}", field="prompts")
    if prompts and isinstance(prompts[0], int):
        return [list(prompts)]
    return list(prompts)


def _params_list(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None:
        return [SamplingParams()] * count
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise InvalidInput(f"{len(params)} sampling params for {count} prompts", field="sampling_params")
    return list(params)
