"""POST /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from weightcast.engines.lengths import check_text_length
from weightcast.errors import InvalidInput, Unsupported
from weightcast.server.body import aside
from weightcast.server.context import ServerContext
from weightcast.server.operation import Operation
from weightcast.server.prompts import chat_prompt
from weightcast.server.replies import json_response
from weightcast.server.schemas import ChatMessage, ChatRequest

_SURE_CHARACTERS = 2**20
"""So many characters are looked at in any case; more only where the model could take them."""
_MAX_ID = 2**31 - 1


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """A text or a conversation, exactly one of them."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """Token ids whose text is wanted."""

    tokens: list[int]
    model: str | None = None


class TokenRoutes:
    """The routes over one context."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context

    def operations(self) -> list[Operation]:
        def post(path: str, handler: Any, summary: str, body: type[msgspec.Struct]) -> Operation:
            return Operation(
                method="POST", path=path, handler=handler, summary=summary, tag="openai", guard="api_key", body=body
            )

        return [
            post("/tokenize", self.tokenize, "Token ids of a text or a conversation", TokenizeRequest),
            post("/detokenize", self.detokenize, "The text of token ids", DetokenizeRequest),
        ]

    async def tokenize(self, http: Request) -> Response:
        request, nbytes = await self._context.bodies.read(http, TokenizeRequest)
        self._context.adapter_of(request.model)
        ids = await aside(nbytes, lambda: self._ids(request))
        texts = self._tokenizer().convert_ids_to_tokens(ids) if request.return_token_strs else None
        max_model_len = self._context.engine.max_model_len
        return json_response({"count": len(ids), "max_model_len": max_model_len, "tokens": ids, "token_strs": texts})

    async def detokenize(self, http: Request) -> Response:
        request, nbytes = await self._context.bodies.read(http, DetokenizeRequest)
        self._context.adapter_of(request.model)
        tokenizer = self._tokenizer()
        strange = [token for token in request.tokens if not 0 <= token <= _MAX_ID]
        if strange:
            raise InvalidInput(f"{strange[0]} is no token id", field="tokens")
        text = await aside(nbytes, lambda: tokenizer.decode(request.tokens))
        return json_response({"prompt": text})

    def _ids(self, request: TokenizeRequest) -> list[int]:
        tokenizer = self._tokenizer()
        if (request.prompt is None) == (request.messages is None):
            raise InvalidInput("give either prompt or messages", field="prompt")
        if request.messages is not None:
            chat = ChatRequest(
                messages=request.messages,
                tools=request.tools,
                add_special_tokens=request.add_special_tokens,
                add_generation_prompt=request.add_generation_prompt,
                continue_final_message=request.continue_final_message,
                chat_template_kwargs=request.chat_template_kwargs,
            )
            return chat_prompt(chat, tokenizer, self._context.engine.max_model_len)
        assert request.prompt is not None
        if len(request.prompt) > _SURE_CHARACTERS:
            check_text_length(request.prompt, tokenizer, self._context.engine.max_model_len)
        special = request.add_special_tokens is not False
        return [int(token) for token in tokenizer.encode(request.prompt, add_special_tokens=special)]

    def _tokenizer(self) -> Any:
        tokenizer = self._context.engine.tokenizer
        if tokenizer is None:
            raise Unsupported("the served model has no tokenizer", hint="Send token ids to /v1/completions")
        return tokenizer
