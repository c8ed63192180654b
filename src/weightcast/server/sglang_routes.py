"""SGLang's native routes for rollouts, in its dialect: clients of slime and AReaL work against this server.

Weights come by a Publisher alone, so SGLang's routes that bring them are refused by name. Pausing, aborting and naming versions are those
of ``rl_routes``, under SGLang's names.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from weightcast.deadline import Deadline
from weightcast.engines.base import CompletionOutput, RequestOutput
from weightcast.engines.sampling import RequestOutputKind, SamplingParams
from weightcast.errors import EngineError, InvalidInput, StateError, Unsupported, WeightcastError
from weightcast.server.body import read_struct
from weightcast.server.context import ServerContext
from weightcast.server.control import pause_within
from weightcast.server.fanout import Fanout, unless_disconnected
from weightcast.server.info_routes import publish_hint, readiness
from weightcast.server.operation import Operation
from weightcast.server.replies import RequestRefused, error_body, json_response, status_of
from weightcast.server.sglang_schemas import GenerateBody, SglangAbort, SglangContinue, SglangPause
from weightcast.server.sse import SseResponse

_BY_PUBLISHER = "weights come by weightcast.Publisher(...).publish()"
_REFUSED = {
    **dict.fromkeys(
        (
            "/init_weights_update_group", "/destroy_weights_update_group", "/update_weights_from_disk",
            "/update_weights_from_distributed", "/update_weights_from_tensor", "/update_weights_from_ipc",
            "/begin_weight_update", "/end_weight_update",
        ),
        _BY_PUBLISHER,
    ),
    "/release_memory_occupation": "this engine does not give up its memory",
    "/resume_memory_occupation": "this engine never gives up its memory",
}  # fmt: skip
_PAUSES = {"abort": ("abort", True), "retract": ("keep", True), "in_place": ("keep", False)}


class SglangRoutes:
    """The routes over one context."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._engine = context.engine

    def operations(self) -> list[Operation]:
        def post(path: str, handler: Any, summary: str, body: type[msgspec.Struct] | None, **more: Any) -> Operation:
            fields = {"guard": "token", "changes_weights": True, "body_optional": True, **more}
            return Operation(
                method="POST", path=path, handler=handler, summary=summary, tag="sglang", body=body, **fields
            )

        def get(path: str, handler: Any, summary: str, **more: Any) -> Operation:
            return Operation(method="GET", path=path, handler=handler, summary=summary, tag="sglang", **more)

        generate = {"guard": "api_key", "changes_weights": False, "body_optional": False}
        flush = {"guard": "token", "media_type": "text/plain"}
        return [
            post("/generate", self.generate, "Continue prompts, in SGLang's form", GenerateBody, **generate),
            post("/pause_generation", self.pause, "Stop generation", SglangPause),
            post("/continue_generation", self.go_on, "Go on with generation", SglangContinue),
            post(
                "/abort_request",
                self.abort,
                "End some or all requests",
                SglangAbort,
                changes_weights=False,
                media_type="text/plain",
            ),
            post("/flush_cache", self.flush, "Forget cached keys and values", None, media_type="text/plain"),
            get("/flush_cache", self.flush, "Forget cached keys and values", **flush),
            get("/model_info", self.model_info, "The model and its version"),
            get("/get_model_info", self.model_info, "The model and its version"),
            get("/health_generate", self.health, "200 when requests are served"),
            *(post(path, _refusal(path, why), f"Refused: {why}", None) for path, why in _REFUSED.items()),
        ]

    async def generate(self, http: Request) -> Response:
        body, _ = await self._context.bodies.read(http, GenerateBody)
        body.check_supported()
        prompts = body.prompts()
        params = body.params(len(prompts))
        status = await self._engine.status()
        if not status.ready:
            raise EngineError(
                f"not serving: {status.reason}", engine=self._context.model_name, hint=publish_hint(status)
            )
        names = _names(body, len(prompts))
        try:
            if body.stream:
                return await self._stream(http, body, prompts, params, names)
            return json_response(await unless_disconnected(http.receive, self._whole(body, prompts, params, names)))
        except StateError as error:
            raise RequestRefused(503, str(error), kind="StateError") from error

    async def pause(self, request: Request) -> Response:
        body = await self._read(request, SglangPause)
        if body.mode not in _PAUSES:
            raise InvalidInput(f"mode must be {', '.join(_PAUSES)}, not {body.mode[:40]!r}", field="mode")
        mode, clear_cache = _PAUSES[body.mode]
        deadline = Deadline(self._context.config.weight_call_timeout_s)
        await pause_within(self._engine, mode, clear_cache, deadline)  # type: ignore[arg-type]
        return json_response({"message": "Generation paused successfully.", "status": "ok"})

    async def go_on(self, request: Request) -> Response:
        await self._read(request, SglangContinue)
        await self._engine.resume_generation()
        return json_response({"message": "Generation continued successfully.", "status": "ok"})

    async def abort(self, request: Request) -> Response:
        body = await self._read(request, SglangAbort)
        if not (body.rid or body.abort_all):
            raise InvalidInput("give rid, or abort_all", field="rid")
        ids = None if body.abort_all else self._context.active.engine_ids([body.rid])
        if ids is None or ids:
            await self._engine.abort(ids)
        return PlainTextResponse("")

    async def flush(self, request: Request) -> Response:
        """400 while requests run, as SGLang answers: clients ask again."""
        if await self._engine.reset_prefix_cache():
            return PlainTextResponse("Cache flushed.")
        return PlainTextResponse("Requests are running: their keys and values are in use.", status_code=400)

    async def model_info(self, request: Request) -> Response:
        status = await self._engine.status()
        name = self._engine.model_name
        return json_response(
            {
                "model_path": name,
                "tokenizer_path": name,
                "served_model_name": self._context.model_name,
                "is_generation": True,
                "weight_version": status.weight_version,
            }
        )

    async def health(self, request: Request) -> Response:
        return readiness(await self._engine.status(), self._context.model_name)

    # -- pieces

    async def _read(self, request: Request, cls: Any) -> Any:
        return await read_struct(request, cls, self._context.config.max_body_nbytes, optional=True)

    def _started(
        self,
        stack: ExitStack,
        prompts: list[Any],
        params: list[SamplingParams],
        names: list[str],
        kind: RequestOutputKind,
    ) -> Fanout:
        ids = [stack.enter_context(self._context.active.running((name,), 1))[0] for name in names]
        return Fanout(
            [
                partial(self._engine.generate, prompt, replace(one, output_kind=kind), id)
                for prompt, one, id in zip(prompts, params, ids, strict=True)
            ]
        )

    async def _whole(
        self, body: GenerateBody, prompts: list[Any], params: list[SamplingParams], names: list[str]
    ) -> Any:
        with ExitStack() as stack:
            async with self._started(stack, prompts, params, names, RequestOutputKind.FINAL_ONLY) as fanout:
                outputs = await fanout.last()
        self._context.metrics.count_tokens(outputs)
        version = (await self._engine.status()).weight_version
        found = [
            _answer(body, name, whole, output, version)
            for name, whole in zip(names, outputs, strict=True)
            for output in sorted(whole.outputs, key=lambda output: output.index)
        ]
        return found[0] if body.is_single and len(found) == 1 else found

    async def _stream(
        self, http: Request, body: GenerateBody, prompts: list[Any], params: list[SamplingParams], names: list[str]
    ) -> Response:
        """The first news is awaited before the headers go out: a refusal still gets its own status code."""
        if any(one.n > 1 for one in params):
            raise Unsupported("a stream has one answer a prompt", hint="Send n prompts, or do not stream")
        stack = ExitStack()
        fanout = self._started(stack, prompts, params, names, RequestOutputKind.CUMULATIVE)
        await fanout.__aenter__()

        async def close() -> None:
            await fanout.__aexit__(None, None, None)
            stack.close()

        try:
            first = await unless_disconnected(http.receive, fanout.next())
        except BaseException:
            await close()
            raise
        return SseResponse(self._events(body, names, fanout, first), close)

    async def _events(
        self, body: GenerateBody, names: list[str], fanout: Fanout, changed: list[tuple[int, RequestOutput]]
    ) -> AsyncIterator[bytes]:
        newest: dict[int, RequestOutput] = {}
        try:
            while changed:
                version = (await self._engine.status()).weight_version
                for number, whole in changed:
                    newest[number] = whole
                    part = _answer(body, names[number], whole, whole.outputs[0], version)
                    yield _sse(part if body.is_single else {**part, "index": number})
                changed = await fanout.next()
        except WeightcastError as error:
            yield _sse(error_body(error, status_of(error)))
        self._context.metrics.count_tokens(list(newest.values()))
        yield b"data: [DONE]\n\n"


def _names(body: GenerateBody, count: int) -> list[str]:
    """The requests' ids: the client's, or new ones."""
    given = [body.rid] if isinstance(body.rid, str) else body.rid
    if given is None:
        return [uuid.uuid4().hex for _ in range(count)]
    if len(given) != count:
        raise InvalidInput(f"{len(given)} rids for {count} prompts", field="rid")
    return given


def _answer(body: GenerateBody, name: str, whole: RequestOutput, output: CompletionOutput, live: str) -> dict[str, Any]:
    """One output as SGLang writes it. ``live`` names the version of outputs that have no token."""
    spans = output.weight_versions
    meta: dict[str, Any] = {
        "id": name,
        "finish_reason": _finish_reason(output),
        "prompt_tokens": len(whole.prompt_token_ids),
        "completion_tokens": len(output.token_ids),
        "cached_tokens": 0,
        "weight_version": spans[-1].version if spans else live,
        "weight_versions": [{"version": span.version, "start": span.start, "end": span.end} for span in spans],
    }
    if body.return_logprob:
        meta |= _logprobs(body, output)
    return {"text": output.text, "output_ids": output.token_ids, "meta_info": meta}


def _finish_reason(output: CompletionOutput) -> dict[str, Any] | None:
    match output.finish_reason:
        case None:
            return None
        case "stop":
            last = output.token_ids[-1] if output.token_ids else None
            return {"type": "stop", "matched": last if output.stop_reason is None else output.stop_reason}
        case "length":
            return {"type": "length", "length": len(output.token_ids)}
        case _:
            return {"type": "abort", "message": "Abort"}


def _logprobs(body: GenerateBody, output: CompletionOutput) -> dict[str, Any]:
    """Triples of log-probability, token and, where it is wanted, text."""
    entries = list(zip(output.token_ids, output.logprobs or [], strict=True))

    def told(token: int, entry: Any) -> list[Any]:
        return [entry.logprob, token, entry.decoded_token if body.return_text_in_logprobs else None]

    found: dict[str, Any] = {
        "input_token_logprobs": [],
        "output_token_logprobs": [told(token, entry[token]) for token, entry in entries],
    }
    if body.top_logprobs_num:
        likeliest = [sorted(entry.items(), key=lambda item: item[1].rank) for _, entry in entries]
        found["input_top_logprobs"] = []
        found["output_top_logprobs"] = [
            [told(token, entry) for token, entry in top[: body.top_logprobs_num]] for top in likeliest
        ]
    return found


def _refusal(path: str, why: str) -> Any:
    async def refuse(request: Request) -> Response:
        raise Unsupported(f"{path} is not supported: {why}")

    return refuse


def _sse(body: Any) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
