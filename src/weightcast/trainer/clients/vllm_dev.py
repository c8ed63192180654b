"""VllmDevClient: a vLLM server without weightcast's routes, through its development routes.

The development routes have no token: everybody who reaches the server can use them. vLLM serves the routes with
VLLM_SERVER_DEV_MODE=1 only.
"""

from __future__ import annotations

from collections.abc import (
    Mapping,
    Sequence,
)
from typing import Any
from urllib.parse import urlencode

import msgspec

from weightcast.commit.worker_outcome import sleeps
from weightcast.deadline import Deadline
from weightcast.errors import EngineError, Unsupported
from weightcast.quoted import quoted
from weightcast.trainer.clients import wire
from weightcast.trainer.clients.rpc import RpcEngineClient
from weightcast.trainer.clients.urls import endpoint_of
from weightcast.vllm_protocol.eras import CALL


class VllmDevClient(RpcEngineClient):
    """Reaches workers with ``/collective_rpc`` and pauses by the stock routes."""

    kind = "vllm-dev"

    def __init__(self, url: str) -> None:
        self._endpoint = endpoint_of(url)
        self.host, self.name = self._endpoint.host, self._endpoint.url

    def wait_until_there(self, deadline: Deadline) -> None:
        wire.wait_until_there(self._endpoint, "/get_world_size?include_dp=true", deadline)

    def world_size(self, deadline: Deadline) -> int:
        """Return the number of all workers. Unsupported for several replicas: vLLM passes on the answers of the first replica only."""
        size = int(self._call("GET", "/get_world_size", deadline, {"include_dp": "true"})["world_size"])
        alone = int(self._call("GET", "/get_world_size", deadline, {"include_dp": "false"})["world_size"])
        if size != alone:
            raise Unsupported(
                "data-parallel replicas cannot be reached through vLLM's development routes",
                engine=self.name,
                hint="Have vLLM serve weightcast's own routes (--weight-transfer-config on its command line), or start each replica as a server",
            )
        return size

    def call_workers(self, action: str, payload: Mapping[str, Any], deadline: Deadline) -> list[Any]:
        # Without "timeout": vLLM would give up waiting for its workers and leave their answers to the next call.
        body = {"method": CALL, "args": [action, dict(payload)]}
        answers = self._call("POST", "/collective_rpc", deadline, body=body).get("results")
        return answers if isinstance(answers, list) else []

    def is_paused(self, deadline: Deadline) -> bool:
        return bool(self._call("GET", "/is_paused", deadline).get("is_paused"))

    def pause(self, mode: str, clear_cache: bool, deadline: Deadline) -> None:
        self._call("POST", "/pause", deadline, {"mode": mode, "clear_cache": "true" if clear_cache else "false"})

    def hold(self, reason: str, deadline: Deadline) -> None:
        self.pause("keep", False, deadline)

    def resume(self, deadline: Deadline) -> None:
        """A scheduler whose keys and values sleep is let go on by whoever wakes them up, and not before."""
        if not sleeps(self.ask("status", {}, deadline)):
            self._call("POST", "/resume", deadline)

    def wake_up(self, tags: Sequence[str], deadline: Deadline) -> None:
        self._call("POST", "/wake_up", deadline, [("tags", tag) for tag in tags])

    def forget_cache(self, deadline: Deadline) -> None:
        answer = self._call("POST", "/reset_prefix_cache", deadline, {"reset_running_requests": "true"})
        if not answer.get("success"):
            raise EngineError("vLLM keeps keys and values that former weights computed", engine=self.name)

    def name_version(self, version: str, deadline: Deadline) -> None:
        """Set the version that outputs carry. vLLM 0.26 has no such label; there only the receiver knows its version."""
        self._call("POST", "/update_weight_version", deadline, body={"new_version": version}, may_be_absent=True)

    def _call(
        self,
        method: str,
        path: str,
        deadline: Deadline,
        query: Mapping[str, str] | Sequence[tuple[str, str]] | None = None,
        body: Any = None,
        *,
        may_be_absent: bool = False,
    ) -> dict[str, Any]:
        deadline.check(f"{method} {path}")
        asked = path + (f"?{urlencode(query)}" if query else "")
        content = None if body is None else msgspec.json.encode(body)
        try:
            response = wire.request(method, self._endpoint, asked, content, deadline)
        except wire.FAILURES as error:
            raise wire.failure(error, f"{method} {path}", self.name, deadline) from None
        if 200 <= response.status < 300:
            return wire.json_object(response.content)
        if response.status == 404 and may_be_absent:
            return {}
        hint = "Start it with VLLM_SERVER_DEV_MODE=1" if response.status == 404 else None
        told = quoted(response.content[:400].decode(errors="replace"))
        raise EngineError(f"{method} {path} answered {response.status}: {told}", engine=self.name, hint=hint)
