"""Running an application as a process: the socket, the announcement, and an end within seconds on SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette

from weightcast.engines.base import InferenceEngine
from weightcast.errors import InvalidInput, WeightcastError
from weightcast.server.connections import (
    ACCEPTED_AT_ONCE,
    LISTEN_BACKLOG,
    MAX_CONNECTIONS,
    BoundedProtocol,
    Connections,
    Limits,
    RequestRoom,
    affordable,
)
from weightcast.unix_urls import url_of_path
from weightcast.untrusted.seldom import SeldomFilter
from weightcast.untrusted.written import write_whole

logger = logging.getLogger(__name__)

DRAIN_TIMEOUT_S = 3
EXIT_TIMEOUT_S = 10.0
KEEP_ALIVE_S = 120
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def bind(host: str, port: int) -> socket.socket:
    """A bound TCP socket that does not listen yet; port 0 picks a free one. InvalidInput when it cannot be had."""
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise InvalidInput(f"--host {host}: {error.strerror}", field="host") from None
    family, kind, protocol, _, address = infos[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        is_elsewhere = error.errno == errno.EADDRNOTAVAIL
        hint = "Give an address of this machine, or 0.0.0.0 for all" if is_elsewhere else "Port 0 picks a free one"
        raise InvalidInput(f"cannot bind {host} port {port}: {error.strerror}", field="port", hint=hint) from None
    return sock


def url_of(sock: socket.socket) -> str:
    """The URL that the socket will be served under."""
    if sock.family == socket.AF_UNIX:
        return url_of_path(sock.getsockname())
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if sock.family == socket.AF_INET6 else f"http://{host}:{port}"


@contextlib.contextmanager
def ready_file(path: Path | None) -> Iterator[Callable[[str], None]]:
    """A function that writes the URL to ``path`` in one step; the file is removed when the context ends."""
    written = False

    def write(url: str) -> None:
        nonlocal written
        if path is not None:
            write_whole(path, url + "\n")
            written = True

    if path is not None and not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        raise InvalidInput(
            f"the ready file {path} cannot be written: {_why_not(path.absolute().parent)}",
            field="ready_file",
            hint="Give a path in a folder that is there",
        )
    try:
        yield write
    finally:
        if path is not None and written:
            path.unlink(missing_ok=True)


def _why_not(folder: Path) -> str:
    return f"no permission to write in {folder}" if folder.is_dir() else f"there is no folder {folder}"


def run_server(
    app: Starlette,
    engine: InferenceEngine,
    sock: socket.socket,
    on_listening: Callable[[], None],
    *,
    max_connections: int = MAX_CONNECTIONS,
) -> None:
    """Serve until SIGTERM or SIGINT; requests in flight then end with "abort". A second signal does not wait for them.

    ``on_listening`` is called once connections are accepted. There are at most ``max_connections``, fewer where the process may open
    fewer files. The engine is shut down before this returns. Main thread only.
    """
    book = Connections(Limits(connections=affordable(max_connections)))
    if book.limits.connections < max_connections:
        logger.info("%d connections at a time: this process may open no more files", book.limits.connections)
    uvicorn_log = logging.getLogger("uvicorn.error")
    uvicorn_log.addFilter(SeldomFilter(uvicorn_log))

    def listening() -> None:
        asyncio.get_running_loop().set_exception_handler(book.on_loop_error)
        sock.listen(LISTEN_BACKLOG)
        on_listening()

    asyncio.run(_serve(_Server(server_config(app, book), listening), engine, sock))


def server_config(app: Starlette, book: Connections) -> uvicorn.Config:
    """How uvicorn serves an application whose connections stand in ``book``."""
    protocol: Any = partial(BoundedProtocol, book=book)
    return uvicorn.Config(
        RequestRoom(app, book.limits.requests),
        http=protocol,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="on",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=DRAIN_TIMEOUT_S,
        backlog=ACCEPTED_AT_ONCE,
    )


async def _serve(server: _Server, engine: InferenceEngine, sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    last_resort = threading.Timer(EXIT_TIMEOUT_S, _exit_now)
    last_resort.daemon = True
    aborting: list[asyncio.Task[None]] = []

    def stop() -> None:
        if server.should_exit:
            server.force_exit = True
            return
        server.should_exit = True
        last_resort.start()
        aborting.append(loop.create_task(_abort_all(engine)))

    for number in _SIGNALS:
        loop.add_signal_handler(number, stop)
    try:
        await server.serve(sockets=[sock])
    finally:
        await asyncio.gather(*aborting)
        await engine.shutdown()
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
        last_resort.cancel()


async def _abort_all(engine: InferenceEngine) -> None:
    try:
        await engine.abort()
    except WeightcastError as error:
        logger.warning("requests could not be aborted: %s", error)


def _exit_now() -> None:
    logger.critical("the engine did not stop within %g s; leaving it", EXIT_TIMEOUT_S)
    os._exit(1)


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling, which ends the process by the signal again after a clean shutdown."""

    def __init__(self, config: uvicorn.Config, on_listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_listening = on_listening

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_listening()
