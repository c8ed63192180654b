"""HttpEngineClient: an engine behind its own HTTP server.

Four properties are load-bearing. Every call opens a fresh connection: a kept one may be closed by the server between
rounds, and then a POST cannot be told from one that was carried out. No call is retried. Every call has the deadline of the
round, and the server is told it. An error body is read: its type names the weightcast error that is raised here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx

from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, EngineError, InvalidInput, PeerLost, WeightcastError, error_from_wire
from weightcast.trainer.clients.base import CommitOrder, CommitReply, EngineClient


class HttpEngineClient(EngineClient):
    """Speaks the ``/weightcast/*`` routes that the embedded server and the vLLM plug-in serve."""

    kind = "http"

    def __init__(self, url: str, *, token: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidInput(f"an engine is http://host:port, not {url!r}", field="engines")
        self.name = url.rstrip("/")
        self.host = parts.hostname
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        limits = httpx.Limits(max_keepalive_connections=0)
        self._client = httpx.Client(base_url=self.name, headers=headers, limits=limits, trust_env=False)

    def world_size(self, deadline: Deadline) -> int:
        return int(self._call("GET", "/get_world_size?include_dp=true", deadline)["world_size"])

    def init(self, init_info: Mapping[str, Any], deadline: Deadline) -> None:
        self._call("POST", "/weightcast/init", deadline, {"init_info": dict(init_info)})

    def commit(self, order: CommitOrder, deadline: Deadline) -> CommitReply:
        body = {
            "epoch": order.epoch,
            "round": order.round,
            "version": order.version,
            "pause": order.pause,
            "clear_cache": order.clear_cache,
            "timeout_s": max(deadline.remaining_s(), 0.001),
        }
        answer = self._call("POST", "/weightcast/commit", deadline, body)
        return CommitReply(phases=answer.get("phases", {}))

    def rollback(self, epoch: int, round: int, deadline: Deadline) -> None:
        body = {"epoch": epoch, "round": round, "timeout_s": max(deadline.remaining_s(), 0.001)}
        self._call("POST", "/weightcast/rollback", deadline, body)

    def status(self, deadline: Deadline) -> Mapping[str, Any]:
        return self._call("GET", "/weightcast/status", deadline)

    def shutdown(self, deadline: Deadline) -> None:
        self._call("POST", "/weightcast/shutdown", deadline)

    def close(self) -> None:
        self._client.close()

    def _call(self, method: str, path: str, deadline: Deadline, body: Any = None) -> dict[str, Any]:
        deadline.check(f"{method} {path}")
        try:
            response = self._client.request(method, path, json=body, timeout=deadline.remaining_s())
        except httpx.TimeoutException:
            raise DeadlineExceeded(
                f"{method} {path} took longer than {deadline.timeout_s:g} s", engine=self.name
            ) from None
        except httpx.TransportError as error:
            raise PeerLost(
                f"{method} {path}: {error or type(error).__name__}", engine=self.name, hint="Is the server running?"
            ) from None
        if response.is_success:
            return _json_object(response)
        raise self._error(method, path, response)

    def _error(self, method: str, path: str, response: httpx.Response) -> WeightcastError:
        error = _json_object(response).get("error")
        if isinstance(error, dict) and isinstance(error.get("message"), str):
            return error_from_wire(str(error.get("type")), error["message"]).at(engine=self.name)
        hint = "It has no weightcast routes: start it with weightcast serve, or vLLM with the weightcast plug-in"
        return EngineError(
            f"{method} {path} answered {response.status_code}",
            engine=self.name,
            hint=hint if response.status_code == 404 else None,
        )


def _json_object(response: httpx.Response) -> dict[str, Any]:
    try:
        value = response.json()
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
