"""Joining: while a trainer is slow to answer, requests in flight go on, whichever way the workers were asked to join."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tests.vllm.stock import DEV_MODE

from weightcast.control import Coordinator
from weightcast.deadline import Deadline
from weightcast.errors import ErrorForm, StateError
from weightcast.messages import Refused
from weightcast.testing.models import build_tiny_model
from weightcast.testing.vllm_server import Served, vllm_server
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


@pytest.fixture(scope="module", params=["1", "2"], ids=["one worker", "two workers"])
def served(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Served]:
    model = build_tiny_model(tmp_path_factory.mktemp("joining") / "m", "qwen3", dtype="bfloat16", head_dim=32)
    cores = {"VLLM_CPU_OMP_THREADS_BIND": "|".join("01"[: int(request.param)])}
    with vllm_server(model, "--tensor-parallel-size", request.param, env=DEV_MODE | cores) as running:
        yield running


@pytest.mark.parametrize("way", [own_route, stock_route, calls_of_workers])
def test_requests_go_on_while_the_trainer_does_not_answer(served: Served, way: Way) -> None:
    size = served.get("/get_world_size").json()["world_size"]
    before = served.complete(STORY, 40)["token_ids"]
    coordinator = Coordinator()  # admits, and does not say welcome
    with ThreadPoolExecutor(1) as pool:
        try:
            joining = pool.submit(way, served, invitation(coordinator, size))
            members = coordinator.wait_members("e", size, Deadline(30))
            assert served.complete(STORY, 40)["token_ids"] == before
            assert not joining.done()
            for member in members:
                refusal = StateError(f"worker {member.rank} came in vain")
                coordinator.send(member, Refused(error=ErrorForm.of(refusal)))
            assert "came in vain" in joining.result(60)
        finally:
            coordinator.close()
    assert served.complete(STORY, 40)["token_ids"] == before


def invitation(coordinator: Coordinator, world_size: int) -> dict[str, Any]:
    return {
        "address": f"tcp://127.0.0.1:{coordinator.port}",
        "public_key": coordinator.public_key,
        "ticket": coordinator.issue_ticket("e", world_size),
        "engine": "e",
        "world_size": world_size,
    }
