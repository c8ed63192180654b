"""HttpEngineClient: an engine behind its own HTTP server.

Four properties are load-bearing. Every call opens a fresh connection: a kept one may be closed by the server between
rounds, and then a POST cannot be told from one that was carried out. No call is retried here; one whose answer was lost is
AnswerLost. Every call has one deadline, that of the round, over all its waits, and the server is told it. An error body is
read: its type names the weightcast error that is raised here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import httpcore
import msgspec

from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, EngineError, InvalidInput, PeerLost, WeightcastError, error_from_wire
from weightcast.trainer.clients import wire
from weightcast.trainer.clients.base import AnswerLost, CommitOrder, CommitReply, EngineClient


class HttpEngineClient(EngineClient):
    """Speaks the ``/weightcast/*`` routes that the embedded server and the vLLM plug-in serve."""

    kind = "http"

    def __init__(self, url: str, *, token: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidInput(f"an engine is http://host:port, not {url!r}", field="engines")
        self.name = url.rstrip("/")
        self.host = parts.hostname
        self._headers = {"Content-Type": "application/json"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"

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

    def _call(self, method: str, path: str, deadline: Deadline, body: Any = None) -> dict[str, Any]:
        deadline.check(f"{method} {path}")
        content = None if body is None else msgspec.json.encode(body)
        try:
            response = wire.request(method, self.name + path, self._headers, content, deadline)
        except httpcore.TimeoutException:
            raise DeadlineExceeded(
                f"{method} {path} took longer than {deadline.timeout_s:g} s", engine=self.name
            ) from None
        except httpcore.ConnectError as error:
            raise PeerLost(f"{method} {path}: {error}", engine=self.name, hint="Is the server running?") from None
        except (httpcore.NetworkError, httpcore.ProtocolError) as error:
            raise AnswerLost(f"{method} {path}: {error or type(error).__name__}", engine=self.name) from None
        if 200 <= response.status < 300:
            return _json_object(response.content)
        raise self._error(method, path, response)

    def _error(self, method: str, path: str, response: httpcore.Response) -> WeightcastError:
        error = _json_object(response.content).get("error")
        if isinstance(error, dict) and isinstance(error.get("message"), str):
            return error_from_wire(str(error.get("type")), error["message"]).at(engine=self.name)
        hint = (
            "It has no weightcast routes: start it with weightcast serve, or vLLM with --weight-transfer-config on its command "
            "line. vLLM serves them only where VLLM_PLUGINS, if it is set, names weightcast; without them "
            "trainer.clients.VllmDevClient(url) uses vLLM's development routes"
        )
        return EngineError(
            f"{method} {path} answered {response.status}",
            engine=self.name,
            hint=hint if response.status == 404 else None,
        )


def _json_object(content: bytes) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return {}
    return value if isinstance(value, dict) else {}
