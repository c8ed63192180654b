"""Adapters over HTTP and in an event loop: requests name them as a model, and whoever looks at a server sees their versions."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.support.commit_ways import Loop, serving
from transformers import AutoModelForCausalLM

from weightcast import Publisher
from weightcast.cli.status import ask_all, status_table
from weightcast.engines.base import RequestOutput, SamplingParams
from weightcast.engines.embedded import AsyncLLM
from weightcast.errors import RoundFailed, Unsupported
from weightcast.server import ServerConfig, create_app
from weightcast.testing.models import build_tiny_model
from weightcast.testing.scripted_engine import ScriptedEngine
from weightcast.trainer.clients import AsyncEngineClient, HttpEngineClient

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
PROMPT = [5, 6, 7, 8]
LENGTH = 8


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model"), "qwen3", "float64")


@pytest.fixture
def trainer(path: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    made = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"), adapter_name="policy")
    scatter(made)
    return made


@pytest.fixture
def llm(path: Path) -> Iterator[AsyncLLM]:
    engine = AsyncLLM(path, dtype="float64", num_threads=1, served_model_name="model")
    yield engine
    engine.engine.shutdown()


@torch.no_grad()
def scatter(model: Any) -> None:
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.copy_(torch.randn(value.shape) * 0.3)


def greedy(model: Any, length: int = LENGTH) -> list[int]:
    merged, tokens = copy.deepcopy(model).merge_and_unload().eval(), list(PROMPT)
    with torch.no_grad():
        for _ in range(length):
            tokens.append(int(merged(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(PROMPT) :]


def asked(model: str, **fields: Any) -> dict[str, Any]:
    body = {"model": model, "prompt": PROMPT, "max_tokens": LENGTH, "temperature": 0, "ignore_eos": True}
    return {**body, "return_token_ids": True, **fields}


def test_a_server_of_adapters(trainer: Any, llm: AsyncLLM) -> None:
    with (
        serving(create_app(llm, ServerConfig())) as url,
        httpx.Client(base_url=url, timeout=20) as http,
        Publisher(trainer, [url], adapter="policy", timeout_s=20) as publisher,
    ):

        def completion(model: str, status: int = 200, **fields: Any) -> Any:
            answer = http.post("/v1/completions", json=asked(model, **fields))
            assert answer.status_code == status, answer.text
            return answer.json()

        assert "policy" in completion("policy", status=404)["error"]["message"]
        labels = []
        for _ in range(2):
            scatter(trainer)
            report = publisher.publish()
            assert report.digests_match
            labels.append(f"policy@{report.version}")
            answer = completion("policy")
            (choice,) = answer["choices"]
            assert (answer["model"], choice["adapter"]) == ("policy", labels[-1])
            assert choice["token_ids"] == greedy(trainer)
            assert [span["version"] for span in choice["weight_versions"]] == ["default"]
            assert completion(labels[-1])["choices"][0]["token_ids"] == greedy(trainer)
        assert "adapter" not in completion("model")["choices"][0]
        assert completion(labels[0], status=404)["error"]["type"] == "UnknownModel"
        assert completion("policy@9-ffff", status=404, stream=True)["error"]["param"] == "model"
        chat = {"model": "policy", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        streamed = http.post("/v1/chat/completions", json={**chat, "stream": True})
        assert labels[-1] in streamed.text, streamed.text

        models = {each["id"]: each for each in http.get("/v1/models").json()["data"]}
        assert (models["policy"]["root"], models["policy"]["parent"]) == (labels[-1], "model")
        served = http.get("/weightcast/status").json()
        assert served["weight_version"] == "default"
        assert served["adapters"]["policy"]["weight_version"] == report.version
        assert http.get("/weight_info").json()["adapters"]["policy"]["digest"] == served["adapters"]["policy"]["digest"]
        assert (
            f'weightcast_adapter_requests{{adapter="policy",version="{labels[-1]}"}} 0.0' in http.get("/metrics").text
        )
        assert [each["version"] for each in http.get("/weightcast/rounds").json()["engines"][0]["rounds"]] == labels
        client = HttpEngineClient(url)
        (version,) = list(status_table([client], ask_all([client], 5)).columns[2].cells)
        assert str(version) == f"default, {labels[-1]}"

        order = {"epoch": 1, "round": 1, "version": "3-f", "adapter": "nobody"}
        assert http.post("/weightcast/commit", json=order).status_code == 404
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": "policy"}).status_code == 200
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": "policy"}).status_code == 404
        completion("policy", status=404)
        publisher.connect()
        assert publisher.publish().number == 3
        assert completion("policy")["choices"][0]["token_ids"] == greedy(trainer)


def test_a_stream_goes_on_through_rounds_of_an_adapter(trainer: Any, llm: AsyncLLM) -> None:
    """Nothing pauses: each step of a request that is in flight comes after the one before, by the version that it began with."""
    truth, seen, rounds = greedy(trainer, 120), list[RequestOutput](), 0

    def hear(output: RequestOutput) -> None:
        seen.append(output)
        time.sleep(0.005)  # on the engine's thread: the request lasts for some rounds

    loop = Loop()
    params = SamplingParams(temperature=0.0, max_tokens=120, ignore_eos=True)
    with Publisher(trainer, [AsyncEngineClient(llm, loop.loop)], adapter="policy", timeout_s=20) as publisher:
        first = publisher.publish().version
        llm.engine.submit([llm.engine.request(PROMPT, params, hear, stream=True, adapter="policy")]).result(10)
        while not (seen and seen[-1].finished):
            scatter(trainer)
            before = len(seen)
            publisher.publish()
            rounds += before > 0 and not seen[-1].finished
            assert not llm.engine.paused
    loop.close()
    assert rounds >= 2
    assert seen[-1].outputs[0].token_ids == truth
    assert {output.adapter for output in seen} == {f"policy@{first}"}
    assert llm.engine.status().num_preemptions == 0


def test_one_lost_server_takes_the_round_back_on_the_other(path: Path, trainer: Any, llm: AsyncLLM) -> None:
    """Over HTTP the commit of one engine succeeds and that of the other does not: both go on with the version before."""
    other = AsyncLLM(path, dtype="float64", num_threads=1, served_model_name="model")
    update: Callable[..., Any] = other.update_adapter

    async def refuse(name: str, info: Any) -> None:
        if info["action"] == "commit":
            raise RuntimeError("no room in the step")
        await update(name, info)

    with (
        serving(create_app(llm, ServerConfig())) as first,
        serving(create_app(other, ServerConfig())) as second,
        Publisher(trainer, [first, second], adapter="policy", timeout_s=20) as publisher,
    ):
        version = publisher.publish().version
        truth = greedy(trainer)
        other.update_adapter = refuse  # type: ignore[method-assign]
        scatter(trainer)
        with pytest.raises(RoundFailed, match="no room in the step"):
            publisher.publish()
        with ThreadPoolExecutor(2) as pool:
            answers = list(
                pool.map(lambda url: httpx.post(f"{url}/v1/completions", json=asked("policy")), (first, second))
            )
        for answer in answers:
            (choice,) = answer.json()["choices"]
            assert (choice["adapter"], choice["token_ids"]) == (f"policy@{version}", truth)
        other.update_adapter = update  # type: ignore[method-assign]
        publisher.publish()
        answer = httpx.post(f"{second}/v1/completions", json=asked("policy"))
        assert answer.json()["choices"][0]["token_ids"] == greedy(trainer)
    other.engine.shutdown()


def test_engines_without_adapters_refuse_by_name(trainer: Any) -> None:
    engine = ScriptedEngine()
    with serving(create_app(engine, ServerConfig())) as url, Publisher(trainer, [url], adapter="policy") as publisher:
        with pytest.raises(Unsupported, match="without adapter="):
            publisher.connect()
        assert not engine.named("init_weight_transfer_engine")
        order = {"epoch": 1, "round": 1, "version": "3-f", "adapter": "policy"}
        assert httpx.post(f"{url}/weightcast/commit", json=order).status_code == 422
        assert not engine.named("update_weights")
    with pytest.raises(Unsupported, match="without adapter="):
        Publisher(trainer, [Bare()], adapter="policy")  # type: ignore[list-item]


class Bare:
    """An engine object of somebody else's."""

    def get_world_size(self) -> int:
        return 1
