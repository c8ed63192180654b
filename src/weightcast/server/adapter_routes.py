"""POST /v1/unload_lora_adapter, as vLLM has it. Adapters come from trainers, so loading one from a path is refused."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from weightcast.engines.base import HoldsAdapters
from weightcast.errors import Unsupported
from weightcast.server.body import read_struct
from weightcast.server.context import ServerContext
from weightcast.server.control import NO_ADAPTERS
from weightcast.server.operation import Operation

PUBLISH_HINT = "Publish it: Publisher(peft_model, [url], adapter=...).publish()"


class UnloadBody(msgspec.Struct, kw_only=True):
    """POST /v1/unload_lora_adapter."""

    lora_name: str
    lora_int_id: int | None = None


class AdapterRoutes:
    """The routes over one context."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context

    def operations(self) -> list[Operation]:
        def post(path: str, handler: Any, summary: str, tag: str, **more: Any) -> Operation:
            return Operation(method="POST", path=path, handler=handler, summary=summary, tag=tag, guard="token", **more)

        unload = {"changes_weights": True, "body": UnloadBody}
        return [
            post("/v1/unload_lora_adapter", self.unload, "Serve an adapter no more", "rl", **unload),
            post("/v1/load_lora_adapter", self.load, "Refused: adapters come from trainers", "refused"),
        ]

    async def unload(self, request: Request) -> Response:
        """Requests that run on the adapter end as they would have."""
        body = await read_struct(request, UnloadBody, self._context.config.max_body_nbytes)
        engine = self._context.engine
        if not isinstance(engine, HoldsAdapters):
            raise Unsupported(f"/v1/unload_lora_adapter: {NO_ADAPTERS}")
        await engine.remove_adapter(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    async def load(self, request: Request) -> Response:
        raise Unsupported("/v1/load_lora_adapter: no adapter is read from a path", hint=PUBLISH_HINT)
