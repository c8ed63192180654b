"""Reading requests: bodies with a size limit, JSON into msgspec structs, query flags. Every refusal names its field."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from weightcast.errors import InvalidInput
from weightcast.server.replies import RequestRefused
from weightcast.untrusted.invalid import invalid_input
from weightcast.untrusted.known import known

T = TypeVar("T")
StructT = TypeVar("StructT", bound=msgspec.Struct)

SHORT_BODY_NBYTES = 16 * 2**10
SMALL_BODY_NBYTES = 256 * 2**10
ALL_BODIES_NBYTES = 512 * 2**20

_TRUE = frozenset({"true", "1", "yes", "on"})
_FALSE = frozenset({"false", "0", "no", "off"})


class BodyBudget:
    """What all bodies that an application reads at a time may take together: clients that send much and never end are many."""

    def __init__(self) -> None:
        self.nbytes = 0

    def take(self, nbytes: int) -> None:
        """Raises RequestRefused (503) where others have it."""
        if self.nbytes + nbytes > ALL_BODIES_NBYTES:
            raise RequestRefused(503, "too many large bodies are being read", kind="Overloaded", param="body")
        self.nbytes += nbytes


async def read_body(request: Request, limit_nbytes: int) -> bytes:
    """The whole body, refused with 413 as soon as it is known to pass the limit, and with 503 where all that are being read take too
    much memory together. A small body is always read."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and len(declared) < 20 and int(declared) > limit_nbytes:
        raise _too_large(limit_nbytes)
    budget, taken = _budget_of(request), 0
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > limit_nbytes:
                raise _too_large(limit_nbytes)
            if size > SMALL_BODY_NBYTES:
                budget.take(len(part))
                taken += len(part)
            parts.append(part)
        return b"".join(parts)
    finally:
        budget.nbytes -= taken


def _budget_of(request: Request) -> BodyBudget:
    """That of the application, which is made with its first body."""
    state = request.app.state
    if not hasattr(state, "weightcast_bodies"):
        state.weightcast_bodies = BodyBudget()
    budget: BodyBudget = state.weightcast_bodies
    return budget


async def read_struct(request: Request, cls: type[StructT], limit_nbytes: int, *, optional: bool = False) -> StructT:
    """The body as ``cls``. ``optional``: an empty body or ``null`` means an empty object."""
    data = await read_body(request, limit_nbytes)
    if optional and data.strip() in (b"", b"null"):
        data = b"{}"
    return decode(data, cls)


def decode(data: bytes, cls: type[StructT]) -> StructT:
    """JSON into ``cls``; InvalidInput names the offending field."""
    if not data.strip():
        raise InvalidInput("the request has no body; send a JSON object", field="body")
    try:
        with _without_collecting(len(data)):
            return msgspec.json.decode(data, type=known(cls))
    except msgspec.ValidationError as error:
        raise invalid_input(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"the body is not valid JSON: {error}", field="body") from None
    except RecursionError:
        raise InvalidInput("the body is nested too deeply", field="body") from None


async def aside(nbytes: int, work: Callable[[], T]) -> T:
    """Work on a body: at once when the body is small, else on a thread, while the event loop goes on."""
    return work() if nbytes <= SHORT_BODY_NBYTES else await asyncio.to_thread(work)


@contextmanager
def _without_collecting(nbytes: int) -> Iterator[None]:
    """No garbage is collected while a large body is decoded: a million small lists would be looked through again and again."""
    pauses = nbytes > SMALL_BODY_NBYTES and gc.isenabled()
    if pauses:
        gc.disable()
    try:
        yield
    finally:
        if pauses:
            gc.enable()


@contextmanager
def inside(name: str) -> Iterator[None]:
    """Who checks what lies in the field ``name`` of a body names fields as seen from there: give their place in the body."""
    try:
        yield
    except InvalidInput as error:
        if error.field is not None and error.field.partition(".")[0] != name:
            error.field = name if error.field == "body" else f"{name}.{error.field}"
        raise


def query_flag(request: Request, name: str, default: bool) -> bool:
    """A boolean query parameter as vLLM's clients write it (true/false/1/0, any case)."""
    value = request.query_params.get(name)
    return default if value is None else parse_flag(value, name)


def parse_flag(value: Any, name: str) -> bool:
    """A flag that may come as JSON boolean, number or text."""
    text = str(value).strip().lower()
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise InvalidInput(f"{name} must be true or false, not {str(value)[:40]!r}", field=name)


def _too_large(limit_nbytes: int) -> RequestRefused:
    return RequestRefused(413, f"the body is larger than {limit_nbytes} bytes", kind="BodyTooLarge", param="body")
