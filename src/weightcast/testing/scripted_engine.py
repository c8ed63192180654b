"""ScriptedEngine: an InferenceEngine without a model. Tokens are a pure function of the request and the live version.

For testing servers, clients and trainers: what every answer must be is known beforehand (``expected_tokens``), every call is
recorded, and any call can be made to fail. It keeps the order of calls that weight transfer prescribes.
"""

from __future__ import annotations

import asyncio
import hashlib
import string
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from weightcast.digest.versions import INITIAL_VERSION
from weightcast.engines.base import (
    CompletionOutput,
    EngineStatus,
    FinishReason,
    Logprob,
    PauseMode,
    RequestOutput,
    SamplingParams,
    VersionSpan,
)
from weightcast.errors import EngineError, InvalidInput, PromptTooLong, StateError
from weightcast.testing.tokenizer import VOCAB_SIZE, build_tokenizer

_LETTERS = string.ascii_letters + string.digits
_NUM_CANDIDATES = 24


class _Request:
    """One request in flight."""

    def __init__(self, request_id: str) -> None:
        self.id = request_id
        self.aborted = False


class ScriptedEngine:
    """An InferenceEngine without a model (see the module). The engine sleeps ``token_delay_s`` before each token; ``fail`` scripts
    errors."""

    def __init__(
        self,
        *,
        model_name: str = "scripted",
        max_model_len: int = 2048,
        token_delay_s: float = 0.0,
        wait_for_weights: bool = False,
    ) -> None:
        self.model_name = model_name
        self.max_model_len = max_model_len
        self.tokenizer: Any = build_tokenizer()
        self.token_delay_s = token_delay_s
        self.calls: list[tuple[str, Any]] = []
        self.sampling: list[SamplingParams] = []
        self.aborted: list[str] = []
        """Ids of requests that ended by an abort or by closing their iterator."""
        self.version = INITIAL_VERSION
        self.dirty = False
        self.is_shut_down = False
        self._letters = [int(self.tokenizer.convert_tokens_to_ids(letter)) for letter in _LETTERS]
        self._waits_for_weights = wait_for_weights
        self.seconds: dict[str, float] = {}
        """How long a call of weight transfer or of pausing takes, by the method's name."""
        self._failures: dict[str, list[tuple[Exception, bool]]] = {}
        self._initialised = False
        self._round_open = False
        self._pending: str | None = None
        self._before: tuple[Any, str] | None = None
        """The round that is live, and the version before it."""
        self._num_syncs = 0
        self._num_tokens = 0
        self._paused: PauseMode | None = None
        self._changed = asyncio.Condition()
        self._active: dict[str, _Request] = {}
        self._num_requests = 0

    # Scripting

    def fail(self, method: str, error: Exception, times: int = 1, *, dirty: bool = False) -> None:
        """Make the next ``times`` calls of ``method`` raise ``error``. The method "token" fails in the middle of generating. With
        ``dirty`` the weights are of no version afterwards."""
        if method != "token" and not callable(getattr(self, method, None)):
            raise InvalidInput(f"ScriptedEngine has no method {method!r}", field="method")
        self._failures.setdefault(method, []).extend([(error, dirty)] * times)

    def named(self, method: str) -> list[Any]:
        """Return the arguments of all calls of ``method``, in order."""
        return [arguments for name, arguments in self.calls if name == method]

    def expected_tokens(
        self, prompt_token_ids: Sequence[int], params: SamplingParams, index: int = 0, version: str | None = None
    ) -> list[int]:
        """Return the tokens of output ``index`` when one version makes all of them and no stop ends them."""
        live = self.version if version is None else version
        limit = self._limit(prompt_token_ids, params)
        return [self._entry(prompt_token_ids, params, index, live, position)[0] for position in range(limit)]

    # Generation

    async def generate(
        self, prompt: str | Sequence[int], sampling_params: SamplingParams, request_id: str | None = None
    ) -> AsyncIterator[RequestOutput]:
        self._record("generate", request_id)
        prompt_ids = self._prompt_ids(prompt)
        self._num_requests += 1
        request = _Request(request_id or f"request-{self._num_requests}")
        if request.id in self._active:
            raise InvalidInput(f"request id {request.id!r} is in use", field="request_id")
        self.sampling.append(sampling_params)
        self._active[request.id] = request
        outputs = [CompletionOutput(index=index) for index in range(sampling_params.n)]
        if sampling_params.logprobs is not None:
            for output in outputs:
                output.logprobs = []
        state = RequestOutput(
            request_id=request.id,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=prompt_ids,
            outputs=outputs,
            finished=False,
            prompt_logprobs=self._prompt_logprobs(prompt_ids, sampling_params),
        )
        started = False
        try:
            while not state.finished:
                await self._may_step(request, started)
                started = True
                self._step(state, request, sampling_params)
                yield state
        finally:
            del self._active[request.id]
            if request.aborted or not state.finished:
                self.aborted.append(request.id)
            async with self._changed:
                self._changed.notify_all()

    async def abort(self, request_ids: Sequence[str] | None = None) -> int:
        self._record("abort", None if request_ids is None else list(request_ids))
        chosen = [r for r in self._active.values() if request_ids is None or r.id in request_ids]
        for request in chosen:
            request.aborted = True
        async with self._changed:
            self._changed.notify_all()
        return len(chosen)

    async def pause_generation(self, mode: PauseMode = "abort", clear_cache: bool = True) -> None:
        self._record("pause_generation", {"mode": mode, "clear_cache": clear_cache})
        self._paused = mode
        await self._take_time("pause_generation")
        if mode == "abort":
            await self.abort()
        async with self._changed:
            self._changed.notify_all()
            if mode == "wait":
                await self._changed.wait_for(lambda: not self._active or self._paused != "wait")

    async def resume_generation(self) -> None:
        self._record("resume_generation", None)
        await self._take_time("resume_generation")
        self._paused = None
        async with self._changed:
            self._changed.notify_all()

    async def is_paused(self) -> bool:
        return self._paused is not None

    async def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        self._record("reset_prefix_cache", reset_running_requests)
        return True

    # Weights

    async def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        self._record("init_weight_transfer_engine", dict(init_info))
        if not init_info:
            raise InvalidInput("init_info is empty", field="init_info")
        self._initialised, self._round_open = True, False

    async def start_weight_update(self) -> None:
        self._record("start_weight_update", None)
        if not self._initialised:
            raise StateError("weight transfer is not initialised", hint="Call init_weight_transfer_engine first")
        if self._round_open:
            raise StateError("a weight update is open already", hint="Finish it first")
        self._round_open = True

    async def update_weights(self, update_info: Mapping[str, Any]) -> None:
        update_info = update_info.get("update_info", update_info)
        if not self._round_open:
            raise StateError("no weight update is open", hint="Call start_weight_update first")
        await self._take_time("update_weights")
        try:
            self._record("update_weights", dict(update_info))
            if not update_info:
                raise InvalidInput("update_info is empty", field="update_info")
        except Exception:
            self._round_open = False
            raise
        self._pending = self._scripted_version(update_info)

    def _scripted_version(self, update_info: Mapping[str, Any]) -> str | None:
        """What an update makes live. A roll-back of the round that is live returns to the version before it."""
        action, id = update_info.get("action"), (update_info.get("epoch"), update_info.get("round"))
        if action == "commit" and (self._before is None or self._before[0] != id):
            self._before = (id, self.version)
        if action != "rollback":
            return update_info.get("version")
        if self._before is None or self._before[0] != id:
            return self.version
        before, self._before = self._before[1], None
        return before

    async def finish_weight_update(self, weight_version: str | None = None) -> None:
        if not self._round_open:
            raise StateError("no weight update is open", hint="Call start_weight_update first")
        self._record("finish_weight_update", weight_version)
        self._round_open = False
        self._num_syncs += 1
        self._waits_for_weights = False
        # A roll-back that has nothing to take back heals nothing.
        self.dirty = self.dirty and self._pending == self.version
        self.version = weight_version or self._pending or f"sync-{self._num_syncs}"
        self._pending = None

    async def shutdown_weight_transfer_engine(self) -> None:
        self._record("shutdown_weight_transfer_engine", None)
        self._initialised = self._round_open = False

    async def get_world_size(self, include_dp: bool = True) -> int:
        self._record("get_world_size", include_dp)
        return 1

    async def get_weight_version(self) -> str:
        return self.version

    async def update_weight_version(self, new_version: str) -> None:
        self._record("update_weight_version", new_version)
        self.version = new_version

    async def checksums(self) -> dict[str, str]:
        self._record("checksums", None)
        return {
            name: hashlib.blake2b(f"{name} {self.version}".encode(), digest_size=8).hexdigest()
            for name in ("embed.weight", "head.weight")
        }

    async def status(self) -> EngineStatus:
        self._record("status", None)
        reason = "the engine is shut down" if self.is_shut_down else ""
        reason = reason or ("waiting for weights" if self._waits_for_weights else "dirty" if self.dirty else "")
        return EngineStatus(
            model=self.model_name,
            weight_version=self.version,
            digest=None if self._num_syncs == 0 else hashlib.blake2b(self.version.encode(), digest_size=8).hexdigest(),
            ready=not reason,
            reason=reason,
            dirty=self.dirty,
            paused=self._paused is not None,
            num_running=len(self._active),
            num_waiting=0,
            num_kv_tokens=0,
            kv_capacity_tokens=self.max_model_len,
            num_generated_tokens=self._num_tokens,
            num_preemptions=0,
            num_syncs=self._num_syncs,
            world_size=1,
            backend="scripted",
            alive=not self.is_shut_down,
        )

    async def shutdown(self) -> None:
        self.is_shut_down = True
        await self.abort()

    # The script

    def _record(self, method: str, arguments: Any) -> None:
        self.calls.append((method, arguments))
        self._raise_scripted(method)

    def _raise_scripted(self, method: str) -> None:
        waiting = self._failures.get(method)
        if waiting:
            error, dirty = waiting.pop(0)
            self.dirty = self.dirty or dirty
            raise error

    async def _take_time(self, method: str) -> None:
        if self.seconds.get(method):
            await asyncio.sleep(self.seconds[method])

    def _prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        if self.is_shut_down:
            raise EngineError("the engine is shut down")
        ids = list(self.tokenizer.encode(prompt)) if isinstance(prompt, str) else [int(number) for number in prompt]
        if not ids:
            raise InvalidInput("the prompt has no tokens", field="prompt")
        if not all(0 <= number < VOCAB_SIZE for number in ids):
            raise InvalidInput(f"token ids must be from 0 to {VOCAB_SIZE - 1}", field="prompt")
        if len(ids) >= self.max_model_len:
            raise PromptTooLong.of(f"{len(ids)} input tokens", max_model_len=self.max_model_len)
        return ids

    def _limit(self, prompt_ids: Sequence[int], params: SamplingParams) -> int:
        room = self.max_model_len - len(prompt_ids)
        return room if params.max_tokens is None else min(room, params.max_tokens)

    async def _may_step(self, request: _Request, started: bool) -> None:
        if self.token_delay_s:
            await asyncio.sleep(self.token_delay_s)
        else:
            await asyncio.sleep(0)
        async with self._changed:
            await self._changed.wait_for(
                lambda: request.aborted or self._paused is None or (self._paused == "wait" and started)
            )

    def _step(self, state: RequestOutput, request: _Request, params: SamplingParams) -> None:
        if request.aborted:
            self._end(state, "abort")
            return
        waiting = self._failures.get("token")
        if waiting:
            state.error = str(waiting.pop(0)[0])
            self._end(state, "error")
            return
        for output in state.outputs:
            if output.finish_reason is None:
                self._add_token(state, output, params)
        state.finished = all(output.finish_reason is not None for output in state.outputs)

    def _end(self, state: RequestOutput, reason: FinishReason) -> None:
        for output in state.outputs:
            output.finish_reason = output.finish_reason or reason
        state.finished = True

    def _add_token(self, state: RequestOutput, output: CompletionOutput, params: SamplingParams) -> None:
        position = len(output.token_ids)
        token, entry = self._entry(state.prompt_token_ids, params, output.index, self.version, position)
        output.token_ids.append(token)
        self._num_tokens += 1
        if output.logprobs is not None:
            output.logprobs.append(entry)
        spans = output.weight_versions
        if spans and spans[-1].version == self.version:
            spans[-1] = VersionSpan(version=self.version, start=spans[-1].start, end=position + 1)
        else:
            spans.append(VersionSpan(version=self.version, start=position, end=position + 1))
        output.text += str(self.tokenizer.decode([token]))
        self._check_end(state, output, token, params)

    def _check_end(self, state: RequestOutput, output: CompletionOutput, token: int, params: SamplingParams) -> None:
        enough = len(output.token_ids) >= params.min_tokens
        for text in params.stop:
            if enough and text in output.text:
                end = output.text.index(text) + (len(text) if params.include_stop_str_in_output else 0)
                output.text = output.text[:end]
                output.finish_reason, output.stop_reason = "stop", text
                return
        if enough and token in params.stop_token_ids:
            output.finish_reason, output.stop_reason = "stop", token
        elif len(output.token_ids) >= self._limit(state.prompt_token_ids, params):
            output.finish_reason = "length"

    def _entry(
        self, prompt_ids: Sequence[int], params: SamplingParams, index: int, version: str, position: int
    ) -> tuple[int, dict[int, Logprob]]:
        """The token at a position, and the logprobs to report: odd positions take the fourth likeliest token."""
        key = f"{list(prompt_ids)} {params.seed} {index} {version} {position}".encode()
        ranked = sorted(self._letters, key=lambda token: hashlib.blake2b(key + b"%d" % token).digest())
        rank = 4 if position % 2 else 1
        token = ranked[rank - 1]
        shown = {token: rank, **{ranked[i]: i + 1 for i in range(min(params.logprobs or 0, _NUM_CANDIDATES))}}
        return token, {number: self._logprob(number, place) for number, place in shown.items()}

    def _logprob(self, token: int, rank: int) -> Logprob:
        return Logprob(logprob=-0.25 - 0.5 * rank, rank=rank, decoded_token=str(self.tokenizer.decode([token])))

    def _prompt_logprobs(
        self, prompt_ids: Sequence[int], params: SamplingParams
    ) -> list[dict[int, Logprob] | None] | None:
        if params.prompt_logprobs is None:
            return None
        return [None, *({token: self._logprob(token, 2 + token % 5)} for token in prompt_ids[1:])]
