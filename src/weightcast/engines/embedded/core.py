"""EngineCore: requests in, steps, outputs out. Everything here runs on one thread, between or in forward passes."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from concurrent.futures import Future

import torch

from weightcast.engines.base import FinishReason, Logprob, PauseMode
from weightcast.engines.embedded.adapter_transfer import AdapterTransfers
from weightcast.engines.embedded.adapters import Adapters
from weightcast.engines.embedded.detokenize import Detokenizer
from weightcast.engines.embedded.runner import ModelRunner, StepLogits
from weightcast.engines.embedded.sampler import Sampled, sample, score
from weightcast.engines.embedded.scheduler import Scheduler
from weightcast.engines.embedded.sequence import Request, Sequence
from weightcast.engines.embedded.text import Text
from weightcast.engines.embedded.transfer import WeightTransfer
from weightcast.errors import InvalidInput, StateError

_logger = logging.getLogger(__name__)
_PROMPT_TAIL = 6
"""Tokens of the prompt that the first output token's text may depend on."""


class EngineCore:
    """The engine without its thread. After every call all requests are consistent; no output is ever taken back."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        runner: ModelRunner,
        transfer: WeightTransfer,
        adapters: Adapters,
        adapter_transfers: AdapterTransfers,
        text: Text,
        eos: frozenset[int],
        max_model_len: int,
        max_sequences: int,
        seed: int,
    ) -> None:
        self.scheduler = scheduler
        self.transfer = transfer
        self.adapters = adapters
        self.adapter_transfers = adapter_transfers
        self.requests: dict[str, Request] = {}
        self.paused = False
        self.num_generated = 0
        self._runner = runner
        self._text = text
        self._eos = eos
        self._max_model_len = max_model_len
        self._max_sequences = max_sequences
        self._seeds = random.Random(seed)
        self._arrivals = 0
        self._epoch = 0
        self._draining: int | None = None
        self._drained: list[Future[None]] = []

    def add(self, request: Request) -> None:
        """Queue a request. Raises StateError when the engine may not serve or is full, and InvalidInput for an id that another request
        has."""
        reason = self.transfer.not_ready
        if reason:
            raise StateError(f"the engine does not serve now: {reason}", hint="Publish to it")
        if request.request_id in self.requests:
            raise InvalidInput(f"request id {request.request_id!r} is in use", field="request_id")
        num_known = len(self.scheduler.running) + len(self.scheduler.waiting)
        if request.bounded and num_known >= self._max_sequences:
            raise StateError(
                f"the queue is full: {len(self.scheduler.waiting)} sequences wait",
                hint="Send fewer requests at once, or raise max_waiting",
            )
        request.arrival = self._arrivals
        self._arrivals += 1
        if request.params.prompt_logprobs is not None:
            request.prompt_logprobs = [None]
        seed = request.params.seed
        if seed is None:
            seed = self._seeds.getrandbits(64)
        request.sequences = [self._sequence(request, index, seed) for index in range(request.params.n)]
        if request.adapter is not None:
            request.adapter_version = self.adapters.take(request.adapter)
        self.requests[request.request_id] = request
        for sequence in request.sequences:
            self.scheduler.add(sequence)

    def has_work(self) -> bool:
        """True when a step would compute something."""
        if self.paused:
            return False
        scheduler = self.scheduler
        return bool(scheduler.running) or any(self._may_run(sequence) for sequence in scheduler.waiting)

    def step(self) -> None:
        """One forward pass. An error in it ends the running requests with its text, and the engine goes on.

        The broad except is on purpose: the model is foreign code, and whatever it raises must reach the callers whose
        requests it was computing, not end the thread that all others depend on.
        """
        try:
            self._step()
        except Exception as error:
            # With nothing running it was the next sequence that could not be admitted.
            concerned = self.scheduler.running or self.scheduler.waiting[:1]
            _logger.exception("a step failed; its %d sequences end with an error", len(concerned))
            failed = {id(s.request): s.request for s in concerned}
            for request in failed.values():
                self._end(request, "error", f"{type(error).__name__}: {error}")
            self.scheduler.cache.trim()
            if isinstance(error, torch.cuda.OutOfMemoryError):
                torch.cuda.empty_cache()
        self._settle_drain()

    def abort(self, request_ids: Seq[str] | None = None) -> int:
        """End these requests, or all requests. Ids that are not known are skipped. Returns how many requests ended."""
        names = list(self.requests) if request_ids is None else [n for n in request_ids if n in self.requests]
        for name in names:
            self._end(self.requests[name], "abort", None)
        self._settle_drain()
        return len(names)

    def cancel(self, requests: Iterable[Request]) -> None:
        """Abort these very requests, and no others that may have the same ids."""
        for request in requests:
            if self.requests.get(request.request_id) is request:
                self._end(request, "abort", None)
        self._settle_drain()

    def fail_all(self, reason: str) -> None:
        for request in list(self.requests.values()):
            self._end(request, "error", reason)
        self._settle_drain()

    def pause(self, mode: PauseMode, clear_cache: bool) -> Future[None]:
        """Stop the steps. The future is done when the engine stands still; with mode "wait" that is when all known requests have ended."""
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()  # a waiter that gives up must not cancel it under our hands
        if mode not in ("abort", "wait", "keep"):
            raise InvalidInput(f"mode is abort, wait or keep, not {mode!r}", field="mode")
        if mode == "wait":
            self.paused = False
            self._draining = self._arrivals
            self._drained.append(done)
            self._settle_drain()
            return done
        if mode == "abort":
            self.abort()
        self._stand_still()
        if clear_cache:
            self.scheduler.preempt_all()
        done.set_result(None)
        return done

    def resume(self) -> None:
        """Go on. A pause that still waits for requests to end is given up."""
        self.paused = False
        self._draining = None
        for future in self._drained:
            future.set_exception(StateError("resumed before all requests had finished", hint="Pause again"))
        self._drained.clear()

    def reset_cache(self, reset_running: bool) -> bool:
        """Forget keys and values that running requests do not need, or all of them."""
        if reset_running:
            self.scheduler.preempt_all()
        else:
            self.scheduler.cache.trim()
        return True

    def weights_may_have_changed(self) -> None:
        """Called after any foreign code between two steps: new sequences share no keys and values that were computed before."""
        self._epoch += 1
        if self.transfer.dirty:
            self.fail_all(self.transfer.not_ready)

    def _step(self) -> None:
        work = self.scheduler.schedule(self._epoch, self._may_run)
        if not work:
            return
        logits = self._runner.forward(work)
        self._score_prompts(logits)
        touched = self._sample(logits)
        for request in touched.values():
            self._report(request)

    def _may_run(self, sequence: Sequence) -> bool:
        return self._draining is None or sequence.request.arrival < self._draining

    def _sequence(self, request: Request, index: int, seed: int) -> Sequence:
        prompt = request.prompt_token_ids
        params = request.params
        decode = self._text.decoder(skip_special_tokens=params.skip_special_tokens)
        detokenizer = None
        if decode is not None:
            tail = prompt[-_PROMPT_TAIL:]
            detokenizer = Detokenizer(decode, tail, params.stop, include_stop=params.include_stop_str_in_output)
        return Sequence(
            request=request,
            index=index,
            tokens=list(prompt),
            num_prompt=len(prompt),
            rng=random.Random(f"{seed}:{index}"),
            detokenizer=detokenizer,
            grammar=None if request.grammar is None else request.grammar.copy(),
            logprobs=None if params.logprobs is None else [],
        )

    def _sample(self, logits: StepLogits) -> dict[str, Request]:
        if not logits.samples:
            return {}
        sequences = [work.sequence for work in logits.samples]
        banned = [self._banned(sequence) for sequence in sequences]
        touched: dict[str, Request] = {}
        version = self.transfer.version
        for sequence, sampled in zip(sequences, sample(logits.sample_logits, sequences, banned), strict=True):
            if sequence.finish_reason is not None:
                continue
            if not sampled.finite:
                self._end(sequence.request, "error", "the model's logits are not finite numbers")
                continue
            if sequence.grammar is not None and not sequence.grammar.accept(sampled.token):
                self._end(sequence.request, "error", f"structured_outputs: {sequence.grammar.error}")
                continue
            self._accept(sequence, sampled, version)
            touched[sequence.request.request_id] = sequence.request
        return {name: request for name, request in touched.items() if request.error is None}

    def _accept(self, sequence: Sequence, sampled: Sampled, version: str) -> None:
        sequence.append(sampled.token, version)
        self.num_generated += 1
        if sequence.logprobs is not None:
            sequence.cumulative_logprob += sampled.logprob
            sequence.logprobs.append(self._logprobs(sampled, sequence.params.logprobs or 0))
        reason = self._finish_reason(sequence, sampled.token)
        if reason is not None:
            self.scheduler.remove(sequence)
            sequence.finish_reason = reason

    def _finish_reason(self, sequence: Sequence, token: int) -> FinishReason | None:
        """Why the sequence ends with this token, if it does; keeps its text up to date."""
        params = sequence.params
        enough = sequence.num_output >= params.min_tokens
        stop_id = enough and token in params.stop_token_ids
        # A form that is complete leaves nothing else to sample, whatever was asked about the end of the text.
        complete = sequence.grammar is not None and token in self._eos
        stopped = stop_id or complete or (enough and not params.ignore_eos and token in self._eos)
        full = len(sequence.tokens) >= self._max_model_len
        full = full or (params.max_tokens is not None and sequence.num_output >= params.max_tokens)
        found = self._add_text(sequence, ended=stopped or full, drop_last=stopped, search=enough)
        if found is not None:
            sequence.stop_reason = found
            return "stop"
        if stopped:
            sequence.stop_reason = token if stop_id else None
            return "stop"
        return "length" if full else None

    def _add_text(self, sequence: Sequence, *, ended: bool, drop_last: bool, search: bool) -> str | None:
        """Text is made token by token only where somebody looks at it before the end."""
        detokenizer, params = sequence.detokenizer, sequence.params
        if detokenizer is None:
            return None
        drop = drop_last and not params.include_stop_str_in_output
        found = None
        if params.stop or sequence.request.stream:
            if not drop:
                found = detokenizer.add(sequence.tokens[-1], search=search)
            if ended and found is None:
                found = detokenizer.finish(search=search)
            sequence.text = detokenizer.visible
        elif ended:
            end = len(sequence.tokens) - drop
            detokenizer.finish(sequence.tokens[sequence.num_prompt : end])
            sequence.text = detokenizer.text
        return found

    def _banned(self, sequence: Sequence) -> Seq[int]:
        params = sequence.params
        if sequence.num_output >= params.min_tokens:
            return ()
        return (*params.stop_token_ids, *self._eos)

    def _score_prompts(self, logits: StepLogits) -> None:
        if not logits.scored:
            return
        requests = [work.sequence.request for work, _ in logits.scored]
        tokens = [request.prompt_token_ids[at] for request, (_, at) in zip(requests, logits.scored, strict=True)]
        wanted = [request.params.prompt_logprobs or 0 for request in requests]
        for request, count, scored in zip(
            requests, wanted, score(logits.scored_logits, tokens, max(wanted)), strict=True
        ):
            assert request.prompt_logprobs is not None
            request.prompt_logprobs.append(self._logprobs(scored, count))

    def _logprobs(self, sampled: Sampled, count: int) -> dict[int, Logprob]:
        """The chosen token first, then the likeliest."""
        found = {sampled.token: self._logprob(sampled.token, sampled.logprob, sampled.rank)}
        for rank, (token, logprob) in enumerate(sampled.top[:count], start=1):
            found.setdefault(token, self._logprob(token, logprob, rank))
        return found

    def _logprob(self, token: int, logprob: float, rank: int) -> Logprob:
        return Logprob(logprob=logprob, rank=rank, decoded_token=self._text.token(token))

    def _report(self, request: Request) -> None:
        finished = request.finished
        if finished and self.requests.pop(request.request_id, None) is not None and request.adapter_version is not None:
            self.adapters.release(request.adapter_version)
        if finished or request.stream:
            request.sink(request.output())

    def _end(self, request: Request, reason: FinishReason, error: str | None) -> None:
        """End a request now; its partial outputs stay."""
        for sequence in request.sequences:
            if sequence.finish_reason is None:
                self.scheduler.remove(sequence)
                sequence.finish_reason = reason
                self._flush_text(sequence)
        request.error = error
        self._report(request)

    def _flush_text(self, sequence: Sequence) -> None:
        detokenizer = sequence.detokenizer
        if detokenizer is None:
            return
        seen = bool(sequence.params.stop) or sequence.request.stream
        detokenizer.finish(() if seen else sequence.tokens[sequence.num_prompt :], search=False)
        sequence.text = detokenizer.text

    def _settle_drain(self) -> None:
        """Stand still once everything that a waiting pause waits for has ended."""
        if self._draining is None or any(r.arrival < self._draining for r in self.requests.values()):
            return
        self._stand_still()

    def _stand_still(self) -> None:
        self.paused = True
        self._draining = None
        self.scheduler.cache.trim()
        for future in self._drained:
            future.set_result(None)
        self._drained.clear()
