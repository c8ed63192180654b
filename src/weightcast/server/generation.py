"""One generation request from validated body to answer, whole or streamed; what differs by route is a Dialect."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from weightcast.engines.base import RequestOutput
from weightcast.engines.sampling import MAX_SAMPLES, RequestOutputKind, SamplingParams
from weightcast.errors import EngineError, InvalidInput, StateError, WeightcastError
from weightcast.server.context import ServerContext
from weightcast.server.fanout import Fanout, unless_disconnected
from weightcast.server.info_routes import publish_hint
from weightcast.server.pieces import Job, Piece, Progress, news, usage, whole_piece
from weightcast.server.prompts import PromptItem
from weightcast.server.replies import RequestRefused, error_body, json_response, status_of
from weightcast.server.schemas import CompletionRequest, GenerationRequest
from weightcast.server.sse import SseResponse

logger = logging.getLogger(__name__)


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


class Generator:
    """Runs jobs on the context's engine and writes their answers in one dialect."""

    def __init__(self, context: ServerContext, dialect: Dialect) -> None:
        self._context = context
        self._dialect = dialect

    def job(self, http: Request, request: GenerationRequest, prompts: list[PromptItem], params: SamplingParams) -> Job:
        """A job with fresh ids; RequestRefused when the named model is not the served one."""
        adapter = self._context.adapter_of(request.model)
        if len(prompts) * params.n > MAX_SAMPLES:
            many = f"{len(prompts)} prompts with {params.n} answers each"
            raise InvalidInput(f"{many}; one request may want {MAX_SAMPLES} answers", field="prompt")
        given = request.request_id or http.headers.get("x-request-id")
        name = given or uuid.uuid4().hex
        full = f"{self._dialect.id_prefix}{name}"
        echo = isinstance(request, CompletionRequest) and bool(request.echo)
        return Job(
            id=full, names=(full, name), created=int(time.time()), model=adapter or self._context.model_name, prompts=prompts, params=params,
            request=request, tokenizer=self._context.engine.tokenizer, echo=echo,
            echo_only=echo and request.max_tokens == 0, adapter=adapter,
        )  # fmt: skip

    async def answer(self, http: Request, job: Job) -> Response:
        """Generate and answer. A client that leaves aborts its request in the engine.

        A moment that does not suit (a full queue, an engine that waits for weights) is 503 here: nothing was done, and
        asking again later is right.
        """
        status = await self._context.engine.status()
        if not status.ready:
            raise EngineError(f"not serving: {status.reason}", engine=job.model, hint=publish_hint(status))
        try:
            if job.request.stream:
                return await self._stream(http, job)
            return json_response(await unless_disconnected(http.receive, self._whole(job)))
        except InvalidInput as error:
            if error.field == "structured_outputs" and job.request.structured_outputs is None:
                error.field = "response_format"  # the name by which the caller gave the form
            raise
        except StateError as error:
            raise RequestRefused(503, str(error), kind="StateError") from error

    async def _whole(self, job: Job) -> dict[str, Any]:
        with self._context.active.running(job.names, len(job.prompts)) as ids:
            async with self._fanout(job, ids, RequestOutputKind.FINAL_ONLY) as fanout:
                prompts = [job.shown(prompt) for prompt in await fanout.last()]
        self._context.metrics.count_tokens(prompts)
        choices = [
            self._dialect.choice(job, whole_piece(job, number * job.params.n + output.index, prompt, output))
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
        generate: Callable[..., AsyncIterator[RequestOutput]] = self._context.engine.generate
        params = replace(job.params, output_kind=kind)
        if job.adapter is not None:
            generate = partial(generate, adapter=job.adapter)
        return Fanout([partial(generate, prompt, params, id) for prompt, id in zip(job.prompts, ids, strict=True)])

    async def _events(self, job: Job, fanout: Fanout, changed: list[tuple[int, RequestOutput]]) -> AsyncIterator[bytes]:
        progress = Progress()
        try:
            while changed:
                for number, whole in changed:
                    prompt = progress.newest[number] = job.shown(whole)
                    for piece in news(job, number, prompt, progress):
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

    def _event(self, job: Job, choices: list[Any], progress: Progress, final: bool = False) -> bytes:
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


def _sse(body: Any) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
