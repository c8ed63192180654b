"""Metrics of weight sync: on weightcast's own server, and beside the control routes in another one."""

from __future__ import annotations

import dataclasses

import httpx
import pytest
import torch
from starlette.applications import Starlette

from weightcast import Publisher
from weightcast.errors import EngineError
from weightcast.server import EngineCommitter, TokenAuth, control_router
from weightcast.server.metrics import ServerMetrics
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.testing.scripted_engine import ScriptedEngine

URL, TOKEN = "http://localhost:8000", "secret"
INIT = {"init_info": {"address": "tcp://127.0.0.1:1"}}


def client_of(engine: ScriptedEngine) -> httpx.AsyncClient:
    app = Starlette(routes=control_router(EngineCommitter(engine), TokenAuth(TOKEN)).routes)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app, client=("127.0.0.1", 1)), base_url=URL)


@pytest.mark.anyio
async def test_another_server_has_them_beside_the_control_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ScriptedEngine()
    async with client_of(engine) as client:
        token = {"Authorization": f"Bearer {TOKEN}"}
        init = await client.post("/weightcast/init", headers=token, json=INIT)
        assert init.status_code == 200, init.text
        order = {"epoch": 1, "round": 1, "version": "1-ab"}
        assert (await client.post("/weightcast/commit", headers=token, json=order)).status_code == 200
        answer = await client.get("/weightcast/metrics")
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/plain")
        assert 'weightcast_weight_version_info{digest="' in answer.text
        assert 'version="1-ab"' in answer.text
        assert 'weightcast_weight_operation_seconds_count{operation="commit",outcome="ok"} 1.0' in answer.text
        assert 'weightcast_weight_phase_seconds_count{operation="commit",phase="apply"} 1.0' in answer.text

        async def gone() -> None:
            raise EngineError("it is gone")

        monkeypatch.setattr(engine, "status", gone)
        assert "weightcast_engine_up 0.0" in (await client.get("/weightcast/metrics")).text
    await engine.shutdown()


@pytest.mark.anyio
async def test_bytes_are_told_where_they_are_counted() -> None:
    engine = ScriptedEngine()
    status = await engine.status()
    assert b"weightcast_weight_bytes" not in ServerMetrics().render(status)
    counted = dataclasses.replace(status, num_weight_bytes=4096)
    assert b"weightcast_weight_bytes_total 4096.0" in ServerMetrics().render(counted)
    await engine.shutdown()


@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_a_worker_counts_the_bytes_of_all_its_trainers(mode: str) -> None:
    engine = LocalEngine("here", [DictModel({"w": torch.zeros(64)})], mode=mode)
    try:
        assert engine.workers[0].num_weight_bytes == 0
        with Publisher({"w": torch.ones(64)}, [engine], timeout_s=10) as publisher:
            publisher.publish()
            publisher.publish()
        with Publisher({"w": torch.ones(64)}, [engine], timeout_s=10) as publisher:
            publisher.publish()
            assert engine.workers[0].num_weight_bytes == 3 * 256
    finally:
        engine.stop()
    assert engine.workers[0].num_weight_bytes == 3 * 256
