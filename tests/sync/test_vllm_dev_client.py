"""The client of vLLM's development routes, against a server that speaks them for a scripted engine."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, EngineError, LoadError
from weightcast.testing.scripted_vllm import Failure, ScriptedVllm
from weightcast.trainer.clients import CommitOrder, VllmDevClient

SOON = 5.0


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


@pytest.fixture
def server() -> Iterator[DevServer]:
    running = DevServer(ScriptedVllm(2))
    yield running
    running.close()


def commit(client: VllmDevClient, number: int, timeout_s: float = SOON) -> None:
    client.commit(CommitOrder(epoch=1, round=number, version=f"{number}-x"), Deadline(timeout_s))


def test_a_round_without_a_time_limit_of_vllms(server: DevServer) -> None:
    client = VllmDevClient(server.url)
    client.init({}, Deadline(SOON))
    commit(client, 1)
    engine = server.engine
    assert (engine.versions, engine.label, engine.paused) == (["1-x", "1-x"], "1-x", False)
    assert all("timeout" not in body for body in server.bodies)
    assert "pause keep clear=True" in engine.calls


@pytest.mark.parametrize("step", ["pause", "commit", "resume"])
def test_an_overrun_freezes_nothing(server: DevServer, step: str) -> None:
    client = VllmDevClient(server.url)
    commit(client, 1)
    engine = server.engine
    engine.seconds[step] = 0.8
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        commit(client, 2, 0.3)
    assert time.monotonic() - start < 0.3 + 2
    engine.seconds.clear()
    client.rollback(1, 2, Deadline(SOON))
    assert (engine.versions, engine.paused) == (["1-x", "1-x"], False)


def test_a_dirty_server_is_healed_by_another_trainer(server: DevServer) -> None:
    engine = server.engine
    engine.workers[1].fails["commit"] = Failure(dirty=True)
    with pytest.raises(LoadError):
        commit(VllmDevClient(server.url), 1)
    assert engine.paused
    commit(VllmDevClient(server.url), 2)
    assert (engine.versions, engine.paused) == (["2-x", "2-x"], False)


def test_a_cache_that_the_server_keeps_fails_the_round(server: DevServer) -> None:
    server.engine.keeps_cache = True
    with pytest.raises(EngineError, match="Failed to reset"):
        commit(VllmDevClient(server.url), 1)
    assert not server.engine.paused
