"""/openapi.json, made from the same table as the routes and the same structs that validate bodies."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import msgspec

from weightcast.server.operation import Operation

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string", "description": "class name in weightcast.errors"},
                "param": {"type": ["string", "null"], "description": "the field at fault"},
                "code": {"type": "integer", "description": "the status code"},
                "detail": {
                    "type": "object",
                    "description": "the error's parts, of calls that change weights",
                    "required": ["kind", "message"],
                    "properties": {
                        "kind": {"type": "string", "description": "class name in weightcast.errors"},
                        "message": {"type": "string"},
                        "engine": {"type": ["string", "null"]},
                        "worker": {"type": ["integer", "null"]},
                        "phase": {"type": ["string", "null"]},
                        "round": {"type": ["integer", "null"]},
                        "field": {"type": ["string", "null"]},
                        "hint": {"type": ["string", "null"]},
                        "trace": {"type": "string", "description": "traceback of an error of another library's"},
                    },
                },
            },
        }
    },
}
_REASONS = {
    "400": "the prompt leaves no room for an answer",
    "401": "missing or wrong token or key",
    "404": "unknown path or model",
    "405": "wrong method",
    "409": "the call is fine, the moment is not",
    "413": "the body is too large",
    "422": "bad input; param names the field",
    "424": "the weights could not be transferred; do not repeat the call",
    "503": "not serving now; nothing was done",
}


def describe(operations: Sequence[Operation]) -> dict[str, Any]:
    """The OpenAPI 3.1 document of these operations."""
    bodies = sorted({operation.body for operation in operations if operation.body}, key=lambda body: body.__name__)
    names = {body: f"{body.__module__.rpartition('.')[2]}.{body.__name__}" for body in bodies}
    schemas: dict[str, Any] = {"Error": _ERROR}
    refs = {}
    for body in bodies:
        schema, components = _schema(body, names[body])
        refs[body] = schema
        schemas.update(components)
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, refs)
    return {
        "openapi": "3.1.0",
        "info": {"title": "weightcast", "version": version("weightcast")},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {name: {"type": "http", "scheme": "bearer"} for name in ("token", "api_key")},
        },
    }


def _operation(operation: Operation, refs: dict[type[msgspec.Struct], Any]) -> dict[str, Any]:
    content: dict[str, Any] = {operation.media_type: {"schema": _answer(operation.media_type)}}
    if operation.body is not None and "stream" in operation.body.__struct_fields__:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    described: dict[str, Any] = {
        "operationId": f"{operation.method.lower()}{operation.path.replace('/', '_')}",
        "summary": operation.summary,
        "tags": [operation.tag],
        "responses": {
            "200": {"description": "done", "content": content},
            **{code: _error(text) for code, text in _REASONS.items() if _possible(code, operation)},
        },
    }
    if operation.query:
        described["parameters"] = [
            {"name": param.name, "in": "query", "required": False, "schema": param.schema, "description": param.description}
            for param in operation.query
        ]  # fmt: skip
    if operation.body is not None:
        body = {"application/json": {"schema": refs[operation.body]}}
        described["requestBody"] = {"required": not operation.body_optional, "content": body}
    if operation.guard != "open":
        described["security"] = [{operation.guard: []}]
    return described


def _answer(media_type: str) -> dict[str, Any]:
    return {"type": "object"} if "json" in media_type else {}


def _possible(code: str, operation: Operation) -> bool:
    if code == "400":
        return operation.tag == "openai" and operation.body is not None
    return code != "424" or operation.changes_weights


def _error(text: str) -> dict[str, Any]:
    return {
        "description": text,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }


def _schema(body: type[msgspec.Struct], name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The schema of one struct; its components are prefixed so that equal class names of two modules stay apart."""
    prefix = f"#/components/schemas/{name}."
    (ref,), components = msgspec.json.schema_components([body], ref_template=prefix + "{name}")
    return ref, {f"{name}.{key}": value for key, value in components.items()}
