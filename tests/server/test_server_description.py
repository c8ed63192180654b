"""/openapi.json and /metrics say what is there."""

from __future__ import annotations

import json
import secrets
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_helpers import client_for

from weightcast.errors import EngineError
from weightcast.testing.scripted_engine import ScriptedEngine


def references(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [ref for item in value.values() for ref in references(item)]
    return [ref for item in value for ref in references(item)] if isinstance(value, list) else []


async def test_the_description_is_complete(http: httpx.AsyncClient) -> None:
    document = (await http.get("/openapi.json")).json()
    assert {"/v1/completions", "/update_weights", "/weightcast/commit", "/openapi.json"} <= set(document["paths"])
    for reference in references(document):
        target = document
        for part in reference.removeprefix("#/").split("/"):
            target = target[part]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            answer = await http.request(method, path)
            assert str(answer.status_code) in operation["responses"], (method, path, answer.text)
            content = operation["responses"][str(answer.status_code)]["content"]
            assert answer.headers["content-type"].split(";")[0] in content
    ids = [operation["operationId"] for methods in document["paths"].values() for operation in methods.values()]
    assert len(set(ids)) == len(ids)


async def test_bodies_that_are_named_alike_stay_apart(http: httpx.AsyncClient) -> None:
    document = (await http.get("/openapi.json")).json()

    def fields(path: str) -> set[str]:
        schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        return set(document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]["properties"])

    assert fields("/weightcast/commit") == {"epoch", "round", "version", "pause", "clear_cache", "timeout_s", "adapter"}
    assert fields("/finish_weight_update") == {"weight_version"}
    assert {"prompt", "logprobs", "return_token_ids"} <= fields("/v1/completions")
    assert {"messages", "top_logprobs"} <= fields("/v1/chat/completions")


async def samples(http: httpx.AsyncClient) -> dict[tuple[str, str], float]:
    text = (await http.get("/metrics")).text
    return {
        (sample.name, json.dumps(sample.labels, sort_keys=True)): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_metrics(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await http.post("/v1/completions", json={"prompt": [[1, 2, 3], [4, 5]], "n": 2, "max_tokens": 4})
    await http.post("/v1/completions", json={"prompt": [[1]], "max_tokens": 3, "stream": True})
    await http.post("/v1/completions", json={"prompt": []})
    await http.get(f"/{secrets.token_hex(8)}")
    await http.post("/weightcast/init", json={"init_info": {"a": 1}})
    await http.post("/weightcast/commit", json={"epoch": 0, "round": 1, "version": "v-9"})
    seen = await samples(http)
    assert seen[("weightcast_prompt_tokens_total", "{}")] == 6
    assert seen[("weightcast_output_tokens_total", "{}")] == 2 * 2 * 4 + 3
    assert seen[("weightcast_generated_tokens_total", "{}")] == 2 * 2 * 4 + 3
    assert seen[("weightcast_http_requests_total", '{"code": "200", "route": "/v1/completions"}')] == 2
    assert seen[("weightcast_http_requests_total", '{"code": "422", "route": "/v1/completions"}')] == 1
    assert seen[("weightcast_http_requests_total", '{"code": "404", "route": "unmatched"}')] == 1
    assert seen[("weightcast_syncs_total", "{}")] == 1
    assert seen[("weightcast_weight_operation_seconds_count", '{"operation": "commit", "outcome": "ok"}')] == 1
    for phase in ("pause", "apply", "resume"):
        assert seen[("weightcast_weight_phase_seconds_count", f'{{"operation": "commit", "phase": "{phase}"}}')] == 1
    digest = (await engine.status()).digest
    labels = json.dumps({"digest": digest, "model": "scripted", "version": "v-9"}, sort_keys=True)
    assert seen[("weightcast_weight_version_info", labels)] == 1


async def test_metrics_of_a_dead_engine(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.fail("status", EngineError("gone"))
    assert (await samples(http))[("weightcast_engine_up", "{}")] == 0
    assert (await samples(http))[("weightcast_engine_up", "{}")] == 1


@pytest.mark.parametrize("name", ["prompt_tokens", "http_requests"])
async def test_applications_do_not_share_metrics(name: str) -> None:
    async with client_for(ScriptedEngine()) as one, client_for(ScriptedEngine()) as other:
        await one.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
        assert any(key[0].startswith(f"weightcast_{name}") and value for key, value in (await samples(one)).items())
        assert not any(key[0] == f"weightcast_{name}_total" and value for key, value in (await samples(other)).items())
