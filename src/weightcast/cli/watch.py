"""weightcast watch: a page in the browser that shows a fleet's versions, rounds and phases as they come."""

from __future__ import annotations

import webbrowser
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Any

import typer

from weightcast.cli.shared import console, reported_errors
from weightcast.errors import InvalidInput
from weightcast.quoted import quoted
from weightcast.report.watched import watched_engines
from weightcast.server.pages import foreign_page
from weightcast.trainer.clients.urls import Endpoint, endpoint_of

ASK_TIMEOUT_S = 3.0
HANDLER_TIMEOUT_S = 10.0
"""How long a browser may take to send its request."""
SHOWN_ROUNDS = 200


def command(
    urls: Annotated[list[str], typer.Argument(help="URLs of engines' servers.")],
    log: Annotated[
        Path | None, typer.Option(help="A publisher's log (Publisher(log=...)): shows its phases, too.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on this machine; 0 chooses one.")] = 0,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Serve a page on this machine that shows what engines serve, round by round, until interrupted."""
    with reported_errors(), WatchServer(urls, log=log, port=port) as server:
        console().print(f"watching {len(urls)} engines at {server.url}", soft_wrap=True, highlight=False)
        if open_browser:
            webbrowser.open(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return


class WatchServer(ThreadingHTTPServer):
    """Two answers, to this machine only: the page, and what all engines say of their rounds."""

    daemon_threads = True

    def __init__(self, urls: Sequence[str], *, log: Path | None = None, port: int = 0) -> None:
        self._endpoints = [endpoint_of(url) for url in urls]
        self._log = log
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise InvalidInput(f"cannot listen on port {port}: {error.strerror}", field="port") from None
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"

    def rounds(self) -> dict[str, Any]:
        """What the page asks for: each engine's status and latest rounds; one that does not answer has no status."""
        with ThreadPoolExecutor(max_workers=min(16, len(self._endpoints) + 1)) as pool:
            engines = [engine for answer in pool.map(_ask, self._endpoints) for engine in answer]
        return {"engines": [*self._trainer(), *engines]}

    def _trainer(self) -> list[dict[str, Any]]:
        if self._log is None or not self._log.exists():
            return []
        import msgspec

        from weightcast.report.roundlog import latest_rounds
        from weightcast.report.rounds import trainer_of

        return [msgspec.to_builtins(trainer_of(latest_rounds(self._log)[-SHOWN_ROUNDS:]))]


def _ask(endpoint: Endpoint) -> list[dict[str, Any]]:
    """What one server says of its engines; whatever it answers, the others' part of the page stays as it is."""
    import httpcore
    import msgspec

    from weightcast.deadline import Deadline
    from weightcast.trainer.clients import wire

    try:
        deadline = Deadline(ASK_TIMEOUT_S)
        answer = wire.request("GET", endpoint, "/weightcast/rounds", None, deadline)
        if answer.status != HTTPStatus.OK:
            return _missing(endpoint, f"/weightcast/rounds answered {answer.status}")
        engines = watched_engines(answer.content)
    except httpcore.TimeoutException:
        return _missing(endpoint, f"no answer in {ASK_TIMEOUT_S:g} s")
    except (httpcore.NetworkError, httpcore.ProtocolError) as error:
        return _missing(endpoint, f"cannot be reached: {type(error).__name__}: {error}")
    except msgspec.DecodeError as error:
        return _missing(endpoint, f"/weightcast/rounds did not answer with rounds: {error}")
    named = [endpoint.url] if len(engines) == 1 else [f"{endpoint.url} {engine.name}" for engine in engines]
    return [{**msgspec.to_builtins(engine), "name": name} for engine, name in zip(engines, named, strict=True)]


def _missing(endpoint: Endpoint, error: str) -> list[dict[str, Any]]:
    return [{"name": endpoint.url, "status": None, "rounds": [], "error": quoted(error)}]


class _Handler(BaseHTTPRequestHandler):
    server: WatchServer
    timeout = HANDLER_TIMEOUT_S

    def do_GET(self) -> None:
        """Refuses pages of other sites, and another name for this machine, which is somebody else's page, too."""
        import msgspec

        from weightcast.report.page import LIVE_PAGE, render

        if (
            self.headers.get("Host", "").rpartition(":")[0] not in ("127.0.0.1", "localhost")
            or foreign_page("GET", self.headers) is not None
        ):
            self.send_error(HTTPStatus.FORBIDDEN)
        elif self.path == "/":
            self._answer("text/html; charset=utf-8", render(LIVE_PAGE).encode())
        elif self.path == "/weightcast/rounds":
            self._answer("application/json", msgspec.json.encode(self.server.rounds()))
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _answer(self, media_type: str, body: bytes) -> None:
        from weightcast.report.page import PAGE_HEADERS

        self.send_response(HTTPStatus.OK)
        for name, value in {**PAGE_HEADERS, "Content-Type": media_type, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: the page asks every second."""
