"""POST /v1/chat/completions."""

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
from weightcast.server.prompts import chat_prompt
from weightcast.server.sampling import chat_sampling
from weightcast.server.schemas import ChatRequest, check_supported


class ChatDialect:
    """Message choices; the prompt's own fields stand beside the choices, as with vLLM."""

    id_prefix = "chatcmpl-"
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def choice(self, job: Job, piece: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return self._choice(job, piece, {"message": message})

    def chunk_choice(self, job: Job, piece: Piece) -> dict[str, Any]:
        delta = {"role": "assistant"} if piece.first else {}
        choice = self._choice(job, piece, {"delta": {**delta, "content": piece.text}})
        if job.wants_ids and piece.first:
            choice["prompt_token_ids"] = piece.prompt.prompt_token_ids
        return choice

    def extra(self, job: Job, prompt: RequestOutput) -> dict[str, Any]:
        extra: dict[str, Any] = {}
        if job.wants_ids:
            extra["prompt_token_ids"] = prompt.prompt_token_ids
        if prompt.prompt_logprobs is not None:
            extra["prompt_logprobs"] = logprobs.prompt_logprobs(prompt.prompt_logprobs)
        return extra

    def _choice(self, job: Job, piece: Piece, content: dict[str, Any]) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": piece.index, **content, "logprobs": None}
        if piece.logprobs is not None and job.params.logprobs is not None:
            choice["logprobs"] = logprobs.chat_logprobs(
                piece.token_ids, piece.logprobs, job.params.logprobs, job.as_ids
            )
        extras = choice_extras(job, piece)
        if job.wants_ids and "message" in content:
            extras["prompt_token_ids"] = piece.prompt.prompt_token_ids
        return choice | extras


class ChatRoutes:
    """The route over one context."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._generator = Generator(context, ChatDialect())

    def operations(self) -> list[Operation]:
        return [
            Operation(
                method="POST",
                path="/v1/chat/completions",
                handler=self.chat,
                summary="Answer a conversation",
                tag="openai",
                guard="api_key",
                body=ChatRequest,
            )
        ]

    async def chat(self, http: Request) -> Response:
        request, nbytes = await self._context.bodies.read(http, ChatRequest)
        check_supported(request)
        engine = self._context.engine
        prompt = await aside(nbytes, lambda: chat_prompt(request, engine.tokenizer, engine.max_model_len))
        job = self._generator.job(http, request, [prompt], chat_sampling(request))
        return await self._generator.answer(http, job)
