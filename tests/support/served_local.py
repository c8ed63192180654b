"""ServedLocal: LocalEngines behind HTTP, as servers of this process, whose answers can get lost."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec

from weightcast.deadline import Deadline
from weightcast.errors import ErrorForm, WeightcastError
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.trainer.clients.base import CommitOrder


class ServedLocal:
    """The routes that a Publisher calls, over one LocalEngine of one worker. ``orders`` are the commits that were asked for."""

    def __init__(self, model: DictModel, *, mode: str = "staged") -> None:
        self.model = model
        self.engine = LocalEngine("behind HTTP", [model], mode=mode)
        self.orders: list[int] = []
        self.lose_answers = 0
        """So many answers to commits get lost on the way."""
        self.before_answer: Callable[[], None] = lambda: None
        """Called between a commit and its answer."""
        served = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer({})

            def do_POST(self) -> None:
                self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def _answer(self, body: dict[str, Any]) -> None:
                try:
                    status, answer = 200, served.route(self.path, body)
                except WeightcastError as error:
                    form = msgspec.to_builtins(ErrorForm.of(error))
                    status, answer = 424, {"error": {"type": form["kind"], "message": form["message"], "detail": form}}
                if answer is None:
                    return
                content = json.dumps(answer).encode()
                with suppress(OSError):  # the caller may have given up
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def route(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """The answer, or None where it gets lost."""
        deadline = Deadline(body.get("timeout_s", 20.0))
        if path.startswith("/get_world_size"):
            return {"world_size": self.engine.world_size(deadline)}
        if path == "/weightcast/init":
            self.engine.init(body["init_info"], deadline)
            return {}
        if path == "/weightcast/rollback":
            self.engine.rollback(body["epoch"], body["round"], deadline)
            return {}
        if path != "/weightcast/commit":
            return dict(self.engine.status(deadline))
        self.orders.append(body["round"])
        order = CommitOrder(epoch=body["epoch"], round=body["round"], version=body["version"])
        reply = self.engine.commit(order, deadline)
        self.before_answer()
        if self.lose_answers:
            self.lose_answers -= 1
            return None
        return {"phases": dict(reply.phases)}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self.engine.stop()
