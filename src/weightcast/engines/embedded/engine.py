"""Engine: what LLM and AsyncLLM share. Builds model, cache and thread; checks and submits requests; the commands."""

from __future__ import annotations

import contextlib
import logging
import threading
import uuid
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from weightcast.engines.base import EngineStatus, LiveDigests, PauseMode, SamplingParams
from weightcast.engines.embedded.adapter_transfer import AdapterTransfers
from weightcast.engines.embedded.adapters import Adapters
from weightcast.engines.embedded.config import EngineConfig
from weightcast.engines.embedded.core import EngineCore
from weightcast.engines.embedded.given import check_given
from weightcast.engines.embedded.grammar import Grammars
from weightcast.engines.embedded.kv import KvCache
from weightcast.engines.embedded.linears import watched
from weightcast.engines.embedded.loading import eos_ids, kv_capacity, load_model, load_tokenizer, model_length
from weightcast.engines.embedded.runner import ModelRunner
from weightcast.engines.embedded.scheduler import Scheduler
from weightcast.engines.embedded.sequence import Request, Sink
from weightcast.engines.embedded.support import probe
from weightcast.engines.embedded.text import Text
from weightcast.engines.embedded.thread import EngineThread
from weightcast.engines.embedded.transfer import WeightTransfer, unwrap
from weightcast.errors import DeadlineExceeded, EngineError, InvalidInput, PromptTooLong
from weightcast.manifest import Manifest
from weightcast.manifest.dtypes import name_of

_logger = logging.getLogger(__name__)

T = TypeVar("T")
_STOP_TIMEOUT_S = 60.0


class Engine:
    """A model on a thread of its own; answers are futures. Methods may be called from any thread."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        check_given(config)
        self.model = load_model(config)
        self.max_model_len = model_length(self.model, config.max_model_len)
        self.text = Text(load_tokenizer(config), self.max_model_len)
        self.model_name = config.served_model_name or _name_of(config.model)
        with watched(self.model) as linears:
            kv_bytes = probe(self.model, longest=self.max_model_len)
        self._adapters = Adapters(self.model, linears, config.max_adapters, config.max_lora_rank)
        self._cache = KvCache(
            kv_capacity(config, self.max_model_len, kv_bytes, self.model.device),
            self.max_model_len,
            config.max_num_seqs,
        )
        self._transfer = WeightTransfer(config.transfer, self.model)
        self._adapter_transfers = AdapterTransfers(config.transfer, self._adapters, reserved=self.model_name)
        eos = eos_ids(self.model, self.text.tokenizer)
        self._grammars = Grammars(self.text.tokenizer, eos, self.vocab_size)
        self.core = EngineCore(
            scheduler=Scheduler(self._cache, config.max_num_seqs, config.max_num_batched_tokens),
            runner=ModelRunner(self.model, self._cache, self._adapters),
            transfer=self._transfer,
            adapters=self._adapters,
            adapter_transfers=self._adapter_transfers,
            text=self.text,
            eos=eos,
            max_model_len=self.max_model_len,
            max_sequences=config.max_num_seqs + config.max_waiting,
            seed=config.seed,
        )
        self._thread = EngineThread(self.core, num_threads=config.num_threads, name=Path(self.model_name).name)
        self._finalizer = weakref.finalize(self, _stop_quietly, self._thread)
        _logger.info(
            "%s on %s: sequences of up to %d tokens, keys and values of up to %d tokens at %d bytes each",
            type(self.model).__name__,
            self.model.device,
            self.max_model_len,
            self._cache.capacity_tokens,
            kv_bytes,
        )

    def request(
        self,
        prompt: Any,
        params: SamplingParams,
        sink: Sink,
        *,
        request_id: str | None = None,
        stream: bool,
        bounded: bool = True,
        adapter: str | None = None,
    ) -> Request:
        """Check a prompt and its parameters against the model; raises InvalidInput, which UnknownModel is for an adapter that is not
        there."""
        if adapter is not None:
            self._adapter_transfers.check(adapter)
        text, ids = self.text.prompt(prompt)
        if not ids:
            raise InvalidInput("the prompt is empty", field="prompt")
        if len(ids) >= self.max_model_len:
            raise PromptTooLong.of(f"{len(ids)} input tokens", max_model_len=self.max_model_len)
        self._check_vocabulary("prompt", ids)
        if params.stop and self.text.tokenizer is None:
            raise InvalidInput("stop strings need a tokenizer", field="stop", hint="Use stop_token_ids")
        self._check_vocabulary("logit_bias", params.logit_bias)
        form = params.structured_outputs
        return Request(
            request_id=request_id or uuid.uuid4().hex,
            prompt=text,
            prompt_token_ids=ids,
            params=params,
            sink=sink,
            stream=stream,
            grammar=None if form is None else self._grammars.compile(form),
            bounded=bounded,
            adapter=adapter,
        )

    def _check_vocabulary(self, field: str, tokens: Iterable[int]) -> None:
        vocab = self.vocab_size
        for token in tokens:
            if not 0 <= token < vocab:
                raise InvalidInput(f"token id {token} is not in the vocabulary of {vocab}", field=field)

    def submit(self, requests: Sequence[Request]) -> Future[None]:
        """Queue requests together. The future raises when a request is refused; the requests before the refused one are queued."""

        def add() -> None:
            for request in requests:
                self.core.add(request)

        return self._thread.call(add)

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def dtype(self) -> str:
        return name_of(self.model.dtype)

    @property
    def alive(self) -> bool:
        return self._thread.alive

    @property
    def weight_version(self) -> str:
        return self._transfer.version

    @property
    def paused(self) -> bool:
        return self.core.paused

    def abort(self, request_ids: Sequence[str] | None) -> Future[int]:
        return self._thread.call(lambda: self.core.abort(request_ids))

    def cancel(self, requests: Sequence[Request]) -> None:
        """Abort requests whose caller went away. Nobody waits for an answer, and a dead engine has no requests left."""
        with contextlib.suppress(EngineError):
            self._thread.call(lambda: self.core.cancel(requests))

    def pause(self, mode: PauseMode, clear_cache: bool) -> Future[Future[None]]:
        """Stop the steps. The inner future is done when the engine stands still."""
        return self._thread.call(lambda: self.core.pause(mode, clear_cache))

    def resume(self) -> Future[None]:
        return self._thread.call(self.core.resume)

    def reset_cache(self, reset_running: bool) -> Future[bool]:
        return self._thread.call(lambda: self.core.reset_cache(reset_running))

    def run_between_steps(self, command: Callable[[], T]) -> Future[T]:
        """Run a function on the engine's thread between two forward passes. The function may change weights."""

        def run() -> T:
            try:
                return command()
            finally:
                self.core.weights_may_have_changed()

        return self._thread.call(run)

    def init_transfer(self, init_info: Any) -> Future[None]:
        """Join a trainer. A thread of its own waits for the trainer's first answer, and steps go on meanwhile."""
        info, joined = unwrap(init_info, "init_info"), Future[None]()
        is_adapter = isinstance(info, Mapping) and info.get("adapter")
        transfer = self._adapter_transfers if is_adapter else self._transfer
        run = self._thread.call if is_adapter else self.run_between_steps

        def join() -> None:
            if not joined.set_running_or_notify_cancel():
                return
            try:
                greeting = run(lambda: transfer.greet(info)).result()
                if greeting is not None:
                    greeting.wait()
                joined.set_result(run(lambda: transfer.init(info)).result())
            except Exception as error:  # noqa: BLE001 - it is the caller's
                joined.set_exception(error)

        threading.Thread(target=join, name="weightcast-join", daemon=True).start()
        return joined

    def start_update(self) -> Future[None]:
        return self.run_between_steps(self._transfer.start)

    def update(self, update_info: Any) -> Future[None]:
        return self.run_between_steps(lambda: self._transfer.update(unwrap(update_info, "update_info")))

    def finish_update(self, weight_version: str | None) -> Future[None]:
        return self.run_between_steps(lambda: self._transfer.finish(weight_version))

    def shutdown_transfer(self) -> Future[None]:
        return self.run_between_steps(self._transfer.shutdown)

    @property
    def adapter_names(self) -> list[str]:
        """The adapters of which a version is live."""
        return self._adapter_transfers.names

    @property
    def joined_adapters(self) -> list[str]:
        """The adapters whose trainer has joined, now or before."""
        return self._adapter_transfers.joined

    def update_adapter(self, name: str, update_info: Any) -> Future[None]:
        """Make a round of an adapter live, or take it back, between two steps. Keys and values stay, as do the weights of the model."""
        return self._thread.call(lambda: self._adapter_transfers.update(name, unwrap(update_info, "update_info")))

    def remove_adapter(self, name: str) -> Future[None]:
        return self._thread.call(lambda: self._adapter_transfers.remove(name))

    def set_version(self, version: str) -> Future[None]:
        if not isinstance(version, str) or not version:
            raise InvalidInput(f"a version is a non-empty text, not {version!r}", field="new_version")
        return self._thread.call(lambda: setattr(self._transfer, "version", version))

    def checksums(self) -> Future[dict[str, str]]:
        return self._thread.call(self._transfer.checksums)

    def tensor_digests(self, manifest: Manifest) -> Future[LiveDigests]:
        return self._thread.call(lambda: self._transfer.tensor_digests(manifest))

    def status(self) -> EngineStatus:
        """Return a snapshot. Needs no answer of the engine's thread, and therefore works during a long step."""
        scheduler, fatal = self.core.scheduler, self._thread.fatal
        reason = self._transfer.not_ready
        if not self._thread.alive:
            reason = f"the engine is gone: {fatal or 'it was shut down'}"
        return EngineStatus(
            model=self.model_name,
            weight_version=self._transfer.version,
            digest=self._transfer.digest,
            ready=not reason,
            reason=reason,
            dirty=self._transfer.dirty,
            paused=self.core.paused,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_kv_tokens=sum(sequence.num_computed for sequence in list(scheduler.running)),
            kv_capacity_tokens=self._cache.capacity_tokens,
            num_generated_tokens=self.core.num_generated,
            num_preemptions=scheduler.num_preemptions,
            num_syncs=self._transfer.num_syncs,
            world_size=1,
            backend=self._transfer.config.backend,
            num_weight_bytes=self._transfer.num_weight_bytes,
            alive=self._thread.alive,
            adapters=self._adapter_transfers.status(),
        )

    def shutdown(self, timeout_s: float = _STOP_TIMEOUT_S) -> None:
        """End all requests (finish_reason "abort") and the thread. A second call does nothing."""
        self._finalizer.detach()
        self._thread.stop(timeout_s)


def _stop_quietly(thread: EngineThread) -> None:
    try:
        thread.stop(_STOP_TIMEOUT_S)
    except DeadlineExceeded as error:
        _logger.error("%s", error)


def _name_of(model: Any) -> str:
    if isinstance(model, str | Path):
        return str(model)
    return getattr(model, "name_or_path", "") or type(model).__name__
