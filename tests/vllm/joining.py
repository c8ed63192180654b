"""Joining while a trainer is slow to answer: requests in flight go on, whichever way the workers were asked to join."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from weightcast.control import Coordinator
from weightcast.deadline import Deadline
from weightcast.errors import ErrorForm, StateError
from weightcast.messages import Refused
from weightcast.testing.vllm_server import Served
from weightcast.trainer.clients.vllm_dev import VllmDevClient

STORY = [3, 1, 4]
Way = Callable[[Served, dict[str, Any]], str]


def own_route(served: Served, init_info: dict[str, Any]) -> str:
    return served.post("/weightcast/init", {"init_info": init_info}, headers=served.headers).text


def stock_route(served: Served, init_info: dict[str, Any]) -> str:
    return served.post("/init_weight_transfer_engine", {"init_info": init_info}, headers=served.headers).text


def calls_of_workers(served: Served, init_info: dict[str, Any]) -> str:
    with pytest.raises(StateError) as caught:
        VllmDevClient(served.url).init(init_info, Deadline(60))
    return str(caught.value)


WAYS: tuple[Way, ...] = (own_route, stock_route, calls_of_workers)
"""The last two need vLLM's development mode."""


def requests_go_on_meanwhile(served: Served, way: Way) -> None:
    """Have all workers join a trainer that does not answer, and look that requests do not wait for it."""
    size = served.get("/get_world_size").json()["world_size"]
    before = served.complete(STORY, 40)["token_ids"]
    coordinator = Coordinator(silence_s=60)  # admits, and does not say welcome
    with ThreadPoolExecutor(1) as pool:
        try:
            joining = pool.submit(way, served, _invitation(coordinator, size))
            members = coordinator.wait_members("e", size, Deadline(120))
            assert served.complete(STORY, 40)["token_ids"] == before
            assert not joining.done(), joining.result()
            for member in members:
                refusal = StateError(f"worker {member.rank} came in vain")
                coordinator.send(member, Refused(error=ErrorForm.of(refusal)))
            assert "came in vain" in joining.result(120)
        finally:
            coordinator.close()
    assert served.complete(STORY, 40)["token_ids"] == before


def _invitation(coordinator: Coordinator, world_size: int) -> dict[str, Any]:
    return {
        "address": f"tcp://127.0.0.1:{coordinator.port}",
        "public_key": coordinator.public_key,
        "ticket": coordinator.issue_ticket("e", world_size),
        "engine": "e",
        "world_size": world_size,
        "silence_s": coordinator.silence_s,
    }
