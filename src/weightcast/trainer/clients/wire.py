"""One HTTP call with one deadline for all of it: resolving is the only wait that it does not bound.

HTTP libraries limit each wait by itself, so a server that accepts, stalls and drips bytes holds its caller for any time. Here
every wait is cut into short ones and ends when the call's deadline does, also when another thread moves that deadline.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import httpcore

from weightcast.deadline import Deadline

T = TypeVar("T")
STEP_S = 0.2


def request(
    method: str, url: str, headers: Mapping[str, str], content: bytes | None, deadline: Deadline
) -> httpcore.Response:
    """One request over a connection of its own. Raises what httpcore does: TimeoutException, NetworkError, ProtocolError."""
    with httpcore.ConnectionPool(network_backend=_Backend(deadline), max_keepalive_connections=0) as pool:
        return pool.request(method, url, headers=list(headers.items()), content=content)


class _Backend(httpcore.NetworkBackend):
    """Connects, and puts the deadline around the stream."""

    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline
        self._inner = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        left_s = self._deadline.remaining_s()
        if left_s <= 0:
            raise httpcore.ConnectTimeout("the deadline has passed")
        return _Stream(self._inner.connect_tcp(host, port, left_s, local_address, socket_options), self._deadline)


class _Stream(httpcore.NetworkStream):
    def __init__(self, inner: httpcore.NetworkStream, deadline: Deadline) -> None:
        self._inner = inner
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._patiently(lambda step_s: self._inner.read(max_bytes, step_s), httpcore.ReadTimeout)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        # Not cut into steps: a write that timed out may have sent a part.
        left_s = self._deadline.remaining_s()
        if left_s <= 0:
            raise httpcore.WriteTimeout("the deadline has passed")
        self._inner.write(buffer, left_s)

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        left_s = max(self._deadline.remaining_s(), 0.001)
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, left_s), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)

    def _patiently(self, step: Callable[[float], T], error: type[httpcore.TimeoutException]) -> T:
        while True:
            left_s = self._deadline.remaining_s()
            if left_s <= 0:
                raise error("the deadline has passed")
            try:
                return step(min(STEP_S, left_s))
            except httpcore.TimeoutException:
                continue
