"""Bodies of the routes that other servers have as well: fields that nobody here knows are ignored, and named in the log once each."""

from __future__ import annotations

import logging
from typing import TypeVar

import msgspec
from starlette.requests import Request

from weightcast.quoted import quoted
from weightcast.server.body import decode, read_body
from weightcast.untrusted.known import known

logger = logging.getLogger(__name__)

StructT = TypeVar("StructT", bound=msgspec.Struct)

_MAX_NAMES = 100
_NAME_CHARACTERS = 60


class LenientBodies:
    """Reads bodies for one application, and remembers which unknown fields were named already."""

    def __init__(self, limit_nbytes: int) -> None:
        self._limit_nbytes = limit_nbytes
        self._named: set[str] = set()

    async def read(self, http: Request, cls: type[StructT]) -> tuple[StructT, int]:
        """The body as ``cls``, and its size. Warns once of each field that ``cls`` does not have."""
        data = await read_body(http, self._limit_nbytes)
        body = decode(data, cls)
        fields = msgspec.json.decode(data, type=known(dict[str, msgspec.Raw]))
        unknown = {name[:_NAME_CHARACTERS] for name in fields if name not in cls.__struct_encode_fields__} - self._named
        # Callers choose the names: after so many different ones nothing is said any more.
        if unknown and len(self._named) < _MAX_NAMES:
            self._named |= unknown
            names = ", ".join(quoted(name, _NAME_CHARACTERS) for name in sorted(unknown)[:_MAX_NAMES])
            logger.warning("%s: unknown fields are ignored: %s (said once)", http.url.path, names)
        return body, len(data)
