"""DevServer: vLLM's development routes, as a server of this process, over a scripted engine."""

from __future__ import annotations

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.support.scripted_vllm import ScriptedVllm


class DevServer:
    """vLLM's routes over a ScriptedVllm."""

    def __init__(self, engine: ScriptedVllm) -> None:
        self.engine = engine
        self.bodies: list[dict[str, Any]] = []
        self._loop = asyncio.new_event_loop()
        routes = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer({})

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                self._answer(json.loads(self.rfile.read(length)) if length else {})

            def _answer(self, body: dict[str, Any]) -> None:
                try:
                    status, answer = 200, json.dumps(routes.route(self.path, body)).encode()
                except RuntimeError as error:
                    status, answer = 500, str(error).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(answer)))
                    self.end_headers()
                    self.wfile.write(answer)
                except OSError:
                    return

            def log_message(self, *_: Any) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._threads = [
            threading.Thread(target=self._loop.run_forever),
            threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}),
        ]
        for thread in self._threads:
            thread.start()

    def route(self, path: str, body: dict[str, Any]) -> Any:
        url = urlsplit(path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        engine = self.engine
        match url.path:
            case "/get_world_size":
                return {"world_size": len(engine.workers)}
            case "/collective_rpc":
                self.bodies.append(body)
                args = (body["args"][0], body["args"][1])
                return {"results": self._run(engine.collective_rpc(body["method"], body.get("timeout"), args))}
            case "/is_paused":
                return {"is_paused": engine.paused}
            case "/pause":
                clear = query["clear_cache"] == "true"
                return self._run(engine.pause_generation(mode=query["mode"], clear_cache=clear))
            case "/wake_up":
                return self._run(engine.wake_up(parse_qs(url.query).get("tags")))
            case "/resume":
                return self._run(engine.resume_generation())
            case "/reset_prefix_cache":
                running = query.get("reset_running_requests") == "true"
                return {"success": self._run(engine.reset_prefix_cache(running))}
            case "/update_weight_version":
                return self._run(engine.update_weight_version(body["new_version"]))
        raise AssertionError(path)

    def close(self) -> None:
        self._server.shutdown()
        self._loop.call_soon_threadsafe(self._loop.stop)
        for thread in self._threads:
            thread.join(5)
        self._server.server_close()
        self._loop.close()

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)
