"""HttpEngineClient: an engine behind its own HTTP server.

Four properties are load-bearing. Every call opens a fresh connection: the server may close a kept connection between rounds, and
then nobody can tell whether a POST was carried out. No call is retried here; a call whose answer was lost is AnswerLost. Every call has
one deadline, that of the round, over all its waits, and the call tells the server that deadline. The type in an error's body names
the weightcast error that is raised here.
"""

from __future__ import annotations

from collections.abc import (
    Callable,
    Mapping,
    Sequence,
)
from typing import TYPE_CHECKING, Any

import httpcore
import msgspec

from weightcast.deadline import Deadline
from weightcast.errors import EngineError, ErrorForm, WeightcastError
from weightcast.quoted import quoted_json
from weightcast.trainer.clients import wire
from weightcast.trainer.clients.base import CommitOrder, CommitReply, EngineClient
from weightcast.trainer.clients.fan_out import Call
from weightcast.trainer.clients.urls import endpoint_of
from weightcast.untrusted.known import known

if TYPE_CHECKING:
    from weightcast.manifest import Manifest

_NO_ROUTES = (
    "It has no weightcast routes: start it with weightcast serve, vLLM with --weight-transfer-config on its command line, or SGLang with "
    "weightcast installed beside it and one tokenizer process. vLLM serves them only where VLLM_PLUGINS, if it is set, names weightcast "
    "(SGLang: SGLANG_PLUGINS); without them trainer.clients.VllmDevClient(url) uses "
    "vLLM's development routes"
)


COMMIT_PATH = "/weightcast/commit"
MOST_WORKERS = 2**20
"""A server that says to have more makes no sense."""


class HttpEngineClient(EngineClient):
    """Speaks the ``/weightcast/*`` routes that the embedded server and the vLLM plug-in serve."""

    kind = "http"

    def __init__(self, url: str, *, token: str | None = None) -> None:
        self._endpoint = endpoint_of(url, token)
        self.host, self.name = self._endpoint.host, self._endpoint.url

    def for_adapter(self, name: str) -> None:
        if type(self) is not HttpEngineClient:
            super().for_adapter(name)
        self.adapter = name

    def wait_until_there(self, deadline: Deadline) -> None:
        wire.wait_until_there(self._endpoint, "/get_world_size?include_dp=true", deadline)

    def world_size(self, deadline: Deadline) -> int:
        path = "/get_world_size?include_dp=true"
        size = self._call("GET", path, deadline).get("world_size")
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= MOST_WORKERS:
            raise self._no_engine(f"GET {path} answered 200 without a world_size", _NO_ROUTES)
        return size

    def init(self, init_info: Mapping[str, Any], deadline: Deadline) -> None:
        self._call("POST", "/weightcast/init", deadline, {"init_info": dict(init_info)})

    def commit(self, order: CommitOrder, deadline: Deadline) -> CommitReply:
        answer = self._call("POST", COMMIT_PATH, deadline, self._commit_body(order, deadline))
        return CommitReply(phases=answer.get("phases", {}))

    @property
    def commits_by_call(self) -> bool:
        # Another class may call its engine in another way.
        return type(self) is HttpEngineClient and Call.can_make(self._endpoint)

    def commit_call(self, order: CommitOrder, deadline: Deadline) -> Call:
        content = msgspec.json.encode(self._commit_body(order, deadline))
        return Call("POST", self._endpoint, COMMIT_PATH, content, deadline)

    def commit_reply(self, call: Call) -> CommitReply:
        answer = self._heard("POST", COMMIT_PATH, call.deadline, call.response)
        return CommitReply(phases=answer.get("phases", {}))

    def _commit_body(self, order: CommitOrder, deadline: Deadline) -> dict[str, Any]:
        return {
            **self._which(),
            "epoch": order.epoch,
            "round": order.round,
            "version": order.version,
            "pause": order.pause,
            "clear_cache": order.clear_cache,
            "timeout_s": deadline.limit_s(),
        }

    def rollback(self, epoch: int, round: int, deadline: Deadline) -> None:
        body = {**self._which(), "epoch": epoch, "round": round, "timeout_s": deadline.limit_s()}
        self._call("POST", "/weightcast/rollback", deadline, body)

    def status(self, deadline: Deadline) -> Mapping[str, Any]:
        status = self._call("GET", "/weightcast/status", deadline)
        if self.adapter:
            adapters = status.get("adapters")
            served = adapters.get(self.adapter) if isinstance(adapters, dict) else None
            status = served if isinstance(served, dict) else {}
        if not isinstance(status.get("weight_version"), str) or not isinstance(status.get("dirty"), bool):
            raise self._no_engine("GET /weightcast/status answered 200 without saying what is served", _NO_ROUTES)
        return status

    def _which(self) -> dict[str, str]:
        """What an order says of the artifact that it is about."""
        return {"adapter": self.adapter} if self.adapter else {}

    def checksums(self, deadline: Deadline) -> Mapping[str, Any]:
        """Return the status with its details, which include the digests of all live tensors. Needs the token."""
        return self._call("GET", "/weightcast/status?checksums=true", deadline)

    def tensor_digests(self, manifest: Manifest, deadline: Deadline) -> Mapping[str, Any]:
        """Return the digest of the live values of each tensor of a checkpoint. Unsupported when the engine does not know where they lie."""
        return self._call("POST", "/weightcast/digests", deadline, {"tensors": manifest.tensors})

    def wake(self, tags: Sequence[str], deadline: Deadline) -> tuple[str, ...]:
        body = {"tags": tuple(tags), "timeout_s": deadline.limit_s()}
        asleep = self._call("POST", "/weightcast/wake", deadline, body).get("asleep")
        if not isinstance(asleep, list) or not all(isinstance(tag, str) for tag in asleep):
            raise self._no_engine("POST /weightcast/wake answered 200 without saying what sleeps", _NO_ROUTES)
        return tuple(asleep)

    def shutdown(self, deadline: Deadline) -> None:
        self._call("POST", "/weightcast/shutdown", deadline)

    def _call(self, method: str, path: str, deadline: Deadline, body: Any = None) -> dict[str, Any]:
        deadline.check(f"{method} {path}")
        content = None if body is None else msgspec.json.encode(body)
        return self._heard(
            method, path, deadline, lambda: wire.request(method, self._endpoint, path, content, deadline)
        )

    def _heard(
        self, method: str, path: str, deadline: Deadline, hear: Callable[[], httpcore.Response]
    ) -> dict[str, Any]:
        """What the server answered; ``hear`` gives its response or raises what ``wire.request`` does."""
        try:
            response = hear()
        except wire.FAILURES as error:
            raise wire.failure(error, f"{method} {path}", self.name, deadline) from error
        if 200 <= response.status < 300:
            answer: dict[str, Any] = quoted_json(wire.json_object(response.content))
            return answer
        raise self._error(method, path, response)

    def _error(self, method: str, path: str, response: httpcore.Response) -> WeightcastError:
        error = wire.json_object(response.content).get("error")
        if isinstance(error, dict) and isinstance(error.get("message"), str):
            return _raised(error, self.name)
        return self._no_engine(
            f"{method} {path} answered {response.status}", _NO_ROUTES if response.status == 404 else None
        )

    def _no_engine(self, message: str, hint: str | None) -> EngineError:
        return EngineError(message, engine=self.name, hint=hint)


def _raised(error: dict[str, Any], engine: str) -> WeightcastError:
    """The error that a server tells of. Where that is one text and a class, a text of weightcast's own ends with its hint already."""
    try:
        return msgspec.convert(error["detail"], known(ErrorForm)).error(engine=engine)
    except (KeyError, msgspec.ValidationError):
        form = ErrorForm(kind=str(error.get("type")), message=error["message"])
    told = form.error(engine=engine)
    if type(told).__name__ == form.kind:
        told.hint = None
    return told
