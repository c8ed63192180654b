"""One generation request from validated body to answer, whole or streamed; what differs by route is a Dialect."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from weightcast.engines.base import CompletionOutput, RequestOutput, RequestOutputKind, SamplingParams
from weightcast.engines.sampling import MAX_SAMPLES
from weightcast.errors import EngineError, InvalidInput, StateError, WeightcastError
from weightcast.server import logprobs
from weightcast.server.context import ServerContext
from weightcast.server.fanout import Fanout, unless_disconnected
from weightcast.server.prompts import PromptItem
from weightcast.server.replies import RequestRefused, error_body, json_response, status_of
from weightcast.server.schemas import GenerationRequest
from weightcast.server.sse import SseResponse

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A request that is ready for the engine."""

    id: str
    names: tuple[str, ...]
    """Ids by which /abort_requests knows it."""
    created: int
    model: str
    prompts: list[PromptItem]
    params: SamplingParams
    request: GenerationRequest

    @property
    def as_ids(self) -> bool:
        return bool(self.request.return_tokens_as_token_ids)

    @property
    def wants_ids(self) -> bool:
        return bool(self.request.return_token_ids)

    @property
    def include_usage(self) -> bool:
        options = self.request.stream_options
        return options is not None and bool(options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        options = self.request.stream_options
        return options is not None and bool(options.continuous_usage_stats)


@dataclass(slots=True, kw_only=True)
class Piece:
    """What one choice says now: everything in a whole answer, the news in a chunk."""

    index: int
    first: bool
    prompt: RequestOutput
    output: CompletionOutput
    text: str
    token_ids: list[int]
    logprobs: list[Any] | None
    text_offset: int


class Dialect(Protocol):
    """How one route writes its answers."""

    id_prefix: str
    object_name: str
    chunk_name: str

    def choice(self, job: Job, piece: Piece) -> dict[str, Any]: ...

    def chunk_choice(self, job: Job, piece: Piece) -> dict[str, Any]: ...

    def extra(self, job: Job, prompt: RequestOutput) -> dict[str, Any]:
        """Fields of the whole answer beside its choices."""
        ...


@dataclass(slots=True)
class _Sent:
    num_tokens: int = 0
    num_chars: int = 0
    text_offset: int = 0
    started: bool = False
    finished: bool = False


@dataclass(slots=True)
class _Progress:
    """What a stream has sent so far, by choice, and the newest state of every prompt."""

    sent: dict[int, _Sent] = field(default_factory=dict)
    newest: dict[int, RequestOutput] = field(default_factory=dict)


class Generator:
    """Runs jobs on the context's engine and writes their answers in one dialect."""

    def __init__(self, context: ServerContext, dialect: Dialect) -> None:
        self._context = context
        self._dialect = dialect

    def job(self, http: Request, request: GenerationRequest, prompts: list[PromptItem], params: SamplingParams) -> Job:
        """A job with fresh ids; RequestRefused when the named model is not the served one."""
        served = self._context.model_name
        if request.model is not None and request.model != served:
            raise RequestRefused(
                404, f"the model {request.model!r} is not served here, only {served!r}", kind="NotFound", param="model"
            )
        if len(prompts) * params.n > MAX_SAMPLES:
            many = f"{len(prompts)} prompts with {params.n} answers each"
            raise InvalidInput(f"{many}; one request may want {MAX_SAMPLES} answers", field="prompt")
        given = request.request_id or http.headers.get("x-request-id")
        name = given or uuid.uuid4().hex
        full = f"{self._dialect.id_prefix}{name}"
        return Job(
            id=full, names=(full, name), created=int(time.time()), model=served, prompts=prompts, params=params,
            request=request,
        )  # fmt: skip

    async def answer(self, http: Request, job: Job) -> Response:
        """Generate and answer. A client that leaves aborts its request in the engine.

        A moment that does not suit (a full queue, an engine that waits for weights) is 503 here: nothing was done, and
        asking again later is right.
        """
        status = await self._context.engine.status()
        if not status.ready:
            raise EngineError(f"not serving: {status.reason}", engine=job.model)
        try:
            if job.request.stream:
                return await self._stream(http, job)
            return json_response(await unless_disconnected(http.receive, self._whole(job)))
        except StateError as error:
            raise RequestRefused(503, str(error), kind="StateError") from error

    async def _whole(self, job: Job) -> dict[str, Any]:
        with self._context.active.running(job.names, len(job.prompts)) as ids:
            async with self._fanout(job, ids, RequestOutputKind.FINAL_ONLY) as fanout:
                prompts = await fanout.last()
        self._context.metrics.count_tokens(prompts)
        choices = [
            self._dialect.choice(job, _whole_piece(number * job.params.n + output.index, prompt, output))
            for number, prompt in enumerate(prompts)
            for output in sorted(prompt.outputs, key=lambda output: output.index)
        ]
        return {
            "id": job.id,
            "object": self._dialect.object_name,
            "created": job.created,
            "model": job.model,
            "choices": choices,
            "usage": usage(prompts),
            **self._dialect.extra(job, prompts[0]),
        }

    async def _stream(self, http: Request, job: Job) -> Response:
        """The first news is awaited before the headers go out: a refusal still gets its own status code."""
        stack = ExitStack()
        ids = stack.enter_context(self._context.active.running(job.names, len(job.prompts)))
        fanout = self._fanout(job, ids, RequestOutputKind.CUMULATIVE)
        await fanout.__aenter__()

        async def close() -> None:
            await fanout.__aexit__(None, None, None)
            stack.close()

        try:
            first = await unless_disconnected(http.receive, fanout.next())
        except BaseException:
            await close()
            raise
        return SseResponse(self._events(job, fanout, first), close)

    def _fanout(self, job: Job, ids: list[str], kind: RequestOutputKind) -> Fanout:
        generate, params = self._context.engine.generate, replace(job.params, output_kind=kind)
        return Fanout([partial(generate, prompt, params, id) for prompt, id in zip(job.prompts, ids, strict=True)])

    async def _events(self, job: Job, fanout: Fanout, changed: list[tuple[int, RequestOutput]]) -> AsyncIterator[bytes]:
        progress = _Progress()
        try:
            while changed:
                for number, prompt in changed:
                    progress.newest[number] = prompt
                    for piece in _news(job, number, prompt, progress):
                        yield self._event(job, [self._dialect.chunk_choice(job, piece)], progress)
                changed = await fanout.next()
            if job.include_usage:
                yield self._event(job, [], progress, final=True)
        except WeightcastError as error:
            # The status line is out already; the error travels as an event, which official clients raise.
            logger.warning("%s failed while streaming: %s", job.id, error)
            yield _sse(error_body(error, status_of(error)))
        self._context.metrics.count_tokens(list(progress.newest.values()))
        yield b"data: [DONE]\n\n"

    def _event(self, job: Job, choices: list[Any], progress: _Progress, final: bool = False) -> bytes:
        body: dict[str, Any] = {
            "id": job.id,
            "object": self._dialect.chunk_name,
            "created": job.created,
            "model": job.model,
            "choices": choices,
        }
        if final or (job.include_usage and job.continuous_usage):
            body["usage"] = usage(list(progress.newest.values()))
        elif job.include_usage:
            body["usage"] = None
        return _sse(body)


def usage(prompts: list[RequestOutput]) -> dict[str, int]:
    """Token counts over all prompts and outputs."""
    num_prompt = sum(len(prompt.prompt_token_ids) for prompt in prompts)
    num_output = sum(len(output.token_ids) for prompt in prompts for output in prompt.outputs)
    return {"prompt_tokens": num_prompt, "completion_tokens": num_output, "total_tokens": num_prompt + num_output}


def choice_extras(job: Job, piece: Piece) -> dict[str, Any]:
    """Fields that both dialects add to a choice: why it ended, its token ids, and the versions that produced it."""
    output = piece.output
    extras: dict[str, Any] = {"finish_reason": output.finish_reason, "stop_reason": output.stop_reason}
    if job.wants_ids:
        extras["token_ids"] = piece.token_ids
    if output.finish_reason is not None:
        extras["weight_versions"] = output.weight_versions
    return extras


def _whole_piece(index: int, prompt: RequestOutput, output: CompletionOutput) -> Piece:
    return Piece(
        index=index,
        first=True,
        prompt=prompt,
        output=output,
        text=output.text,
        token_ids=list(output.token_ids),
        logprobs=output.logprobs,
        text_offset=0,
    )


def _news(job: Job, number: int, prompt: RequestOutput, progress: _Progress) -> list[Piece]:
    """Pieces worth a chunk. Tokens without visible text wait for the next one unless the request wants to see tokens."""
    pieces = []
    shows_tokens = job.wants_ids or job.params.logprobs is not None
    for output in prompt.outputs:
        index = number * job.params.n + output.index
        sent = progress.sent.setdefault(index, _Sent())
        text, token_ids = output.text[sent.num_chars :], output.token_ids[sent.num_tokens :]
        ends = output.finish_reason is not None and not sent.finished
        if not (text or ends or (shows_tokens and token_ids)):
            continue
        entries = (
            None if output.logprobs is None else output.logprobs[sent.num_tokens : sent.num_tokens + len(token_ids)]
        )
        pieces.append(
            Piece(
                index=index,
                first=not sent.started,
                prompt=prompt,
                output=output,
                text=text,
                token_ids=list(token_ids),
                logprobs=entries,
                text_offset=sent.text_offset,
            )
        )
        sent.started, sent.finished = True, ends
        sent.num_chars += len(text)
        sent.num_tokens += len(token_ids)
        if entries is not None:
            sent.text_offset += logprobs.text_length(token_ids, entries)
    return pieces


def _sse(body: Any) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
