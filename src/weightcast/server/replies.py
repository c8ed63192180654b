"""JSON answers, and the one place where an error becomes a status code.

Load-bearing: clients post again on 500, 502 and 503. So a call that may have changed weights never answers 5xx: wrong
moment is 409, wrong input 422, a failed transfer 424. 503 means that nothing was done and that asking again may help.
"""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.responses import Response

from weightcast.errors import EngineError, ErrorForm, InvalidInput, WeightcastError

CLIENT_GONE = 499
FAILED_DEPENDENCY = 424


class RequestRefused(WeightcastError):
    """A refusal that only HTTP knows: unknown path or model, wrong method, too large a body."""

    default_hint = None

    def __init__(self, status: int, message: str, *, kind: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param


def json_response(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """``data`` as JSON; dataclasses and msgspec structs are encoded by field."""
    return Response(msgspec.json.encode(data), status, headers, media_type="application/json")


def status_of(error: WeightcastError, *, changes_weights: bool = False) -> int:
    """The status code for ``error``; see the module's docstring for what ``changes_weights`` rules out."""
    if isinstance(error, RequestRefused):
        return error.status
    if error.http_status < 500:
        return error.http_status
    if changes_weights:
        return FAILED_DEPENDENCY
    return 503 if isinstance(error, EngineError) else 500


def error_body(error: WeightcastError, status: int) -> dict[str, Any]:
    """The body that OpenAI's and vLLM's clients read; ``type`` is the class name in weightcast.errors."""
    kind, param = type(error).__name__, None
    if isinstance(error, RequestRefused):
        kind, param = error.kind, error.param
    elif isinstance(error, InvalidInput):
        param = error.field
    elif isinstance(getattr(error, "field", None), str):
        param = error.field  # type: ignore[attr-defined]
    return {"error": {"message": str(error), "type": kind, "param": param, "code": status}}


def error_response(error: WeightcastError, *, changes_weights: bool = False, guarded: bool = True) -> Response:
    """The answer for ``error``; one to a call that changes weights has a ``detail``. A route that anybody may call, which is not
    ``guarded``, tells no traceback."""
    status = status_of(error, changes_weights=changes_weights)
    headers = {}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if status == 503:
        headers["retry-after"] = "1"
    body = error_body(error, status)
    if changes_weights:
        # Trainers raise the error again; in ``message`` its parts cannot be told apart.
        form = ErrorForm.of(error)
        body["error"]["detail"] = form if guarded else msgspec.structs.replace(form, trace="")
    return json_response(body, status, headers)
