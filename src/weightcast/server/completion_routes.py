"""POST /v1/completions."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from weightcast.engines.base import RequestOutput
from weightcast.server import logprobs
from weightcast.server.body import aside
from weightcast.server.context import ServerContext
from weightcast.server.generation import Generator
from weightcast.server.operation import Operation
from weightcast.server.pieces import Job, Piece, choice_extras
from weightcast.server.prompts import completion_prompts
from weightcast.server.sampling import completion_sampling
from weightcast.server.schemas import CompletionRequest, check_supported


class CompletionDialect:
    """Text choices, prompt-major: prompt 0's n outputs first."""

    id_prefix = "cmpl-"
    object_name = "text_completion"
    chunk_name = "text_completion"

    def choice(self, job: Job, piece: Piece) -> dict[str, Any]:
        choice = self._choice(job, piece)
        if piece.prompt.prompt_logprobs is not None:
            choice["prompt_logprobs"] = logprobs.prompt_logprobs(piece.prompt.prompt_logprobs)
        return choice

    def chunk_choice(self, job: Job, piece: Piece) -> dict[str, Any]:
        return self._choice(job, piece)

    def extra(self, job: Job, prompt: RequestOutput) -> dict[str, Any]:
        return {}

    def _choice(self, job: Job, piece: Piece) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": piece.index, "text": piece.text, "logprobs": None}
        if piece.logprobs is not None and job.params.logprobs is not None:
            choice["logprobs"] = logprobs.completion_logprobs(
                piece.scored_ids, piece.logprobs, job.params.logprobs, piece.text_offset, job.as_ids, job.text_of
            )
        if job.wants_ids and piece.first:
            choice["prompt_token_ids"] = piece.prompt.prompt_token_ids
        return choice | choice_extras(job, piece)


class CompletionRoutes:
    """The route over one context."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._generator = Generator(context, CompletionDialect())

    def operations(self) -> list[Operation]:
        return [
            Operation(
                method="POST",
                path="/v1/completions",
                handler=self.completions,
                summary="Continue one or several prompts",
                tag="openai",
                guard="api_key",
                body=CompletionRequest,
            )
        ]

    async def completions(self, http: Request) -> Response:
        request, nbytes = await self._context.bodies.read(http, CompletionRequest)
        check_supported(request)
        engine = self._context.engine
        prompts = await aside(nbytes, lambda: completion_prompts(request, engine.tokenizer, engine.max_model_len))
        job = self._generator.job(http, request, prompts, completion_sampling(request))
        return await self._generator.answer(http, job)
