"""vLLM's own RL routes as the way to an engine."""

from collections.abc import Mapping
from typing import Any

from packaging.version import Version

import vllm
from weightcast.deadline import Deadline
from weightcast.testing.vllm_server import Served
from weightcast.trainer.clients import CommitOrder, CommitReply, EngineClient

NAMES_VERSIONS = Version(vllm.__version__).release >= (0, 32)
"""Whether vLLM's outputs say which version made which tokens."""
DEV_MODE = {"VLLM_SERVER_DEV_MODE": "1"}
"""vLLM serves its RL routes in development mode only."""


class StockRoutes(EngineClient):
    """Rounds by vLLM's own routes, as other trainers call them."""

    kind = "stock"
    host = "127.0.0.1"

    def __init__(self, served: Served) -> None:
        self.name, self._served = served.url, served

    def _post(self, path: str, body: Any = None) -> None:
        answer = self._served.post(path, body)
        assert answer.status_code == 200, answer.text

    def world_size(self, deadline: Deadline) -> int:
        return int(self._served.get("/get_world_size").json()["world_size"])

    def init(self, init_info: Mapping[str, Any], deadline: Deadline) -> None:
        self._post("/init_weight_transfer_engine", {"init_info": dict(init_info)})

    def commit(self, order: CommitOrder, deadline: Deadline) -> CommitReply:
        self._post(f"/pause?mode={order.pause}")
        self._update(order.epoch, order.round, "commit")
        self._post("/finish_weight_update", {"weight_version": order.version})
        self._post("/resume")
        return CommitReply()

    def rollback(self, epoch: int, round: int, deadline: Deadline) -> None:
        self._update(epoch, round, "rollback")
        self._post("/finish_weight_update")

    def _update(self, epoch: int, round: int, action: str) -> None:
        self._post("/start_weight_update")
        self._post("/update_weights", {"update_info": {"epoch": epoch, "round": round, "action": action}})

    def status(self, deadline: Deadline) -> Mapping[str, Any]:
        return dict(self._served.get("/weightcast/status").json())

    def shutdown(self, deadline: Deadline) -> None:
        self._post("/shutdown_weight_transfer_engine")
