"""What an adapter's name stands for in a process that takes requests for vLLM, and which vLLMs have no adapters; without vLLM."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from weightcast.errors import InvalidInput, UnknownModel, Unsupported
from weightcast.vllm_protocol.eras import AdapterNames, v0_27, v0_32
from weightcast.vllm_protocol.eras.base import require_lora


@dataclass
class Request:
    """vLLM's LoRARequest."""

    lora_name: str
    lora_int_id: int
    lora_path: str


class Processor:
    """vLLM's InputProcessor: makes a request, and may be busy with another one before."""

    def __init__(self) -> None:
        self.free = asyncio.Event()

    def process_inputs(self, name: str, lora_request: Any = None) -> Any:
        return SimpleNamespace(name=name, lora_request=lora_request)

    async def process_inputs_async(self, name: str, lora_request: Any = None) -> Any:
        await self.free.wait()
        return SimpleNamespace(name=name, lora_request=lora_request)


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Processor:
    monkeypatch.setitem(sys.modules, "vllm.lora.request", SimpleNamespace(LoRARequest=Request))
    return Processor()


def by(name: str) -> Request:
    return Request(name, 1, f"weightcast://{name}")


def test_a_request_is_taken_in_for_the_version_that_is_live_then(processor: Processor) -> None:
    names = AdapterNames(processor)

    def taken(name: str) -> tuple[str, int, str]:
        found = processor.process_inputs("r", lora_request=by(name)).lora_request
        return found.lora_name, found.lora_int_id, found.lora_path

    with pytest.raises(UnknownModel, match="never published"):
        taken("policy")
    names.point("policy", "policy@1-a", {"policy@1-a": 70})
    names.point("other", "other@1-a", {"other@1-a": 71})
    assert taken("policy") == ("policy@1-a", 70, "weightcast://policy@1-a")
    names.point("policy", "policy@2-b", {"policy@1-a": 70, "policy@2-b": 72})
    assert taken("policy") == taken("policy@2-b") == ("policy@2-b", 72, "weightcast://policy@2-b")
    assert taken("policy@1-a")[1] == 70
    names.point("policy", "policy@3-c", {"policy@2-b": 72, "policy@3-c": 73})
    with pytest.raises(UnknownModel, match="retired"):
        taken("policy@1-a")
    names.retire("policy", [names.standing("policy")])
    assert taken("policy") == taken("policy@3-c")
    with pytest.raises(UnknownModel, match="retired"):
        taken("policy@2-b")
    names.retire("policy", ["policy@3-c", "policy@4-d"])
    assert taken("policy")[1] == 73
    names.point("policy", "", {"policy@2-b": 72})
    with pytest.raises(UnknownModel, match="policy@2-b"):
        taken("policy")
    assert taken("other")[1] == 71
    own = Request("own", 1, "/somewhere")
    assert processor.process_inputs("r", lora_request=own).lora_request is own
    assert processor.process_inputs("r").lora_request is None


def test_a_version_may_retire_while_a_request_is_tokenised(processor: Processor) -> None:
    names = AdapterNames(processor)
    names.point("policy", "policy@1-a", {"policy@1-a": 70})

    async def ask() -> tuple[str, type[BaseException]]:
        by_name = asyncio.create_task(processor.process_inputs_async("r", lora_request=by("policy")))
        by_label = asyncio.create_task(processor.process_inputs_async("r", lora_request=by("policy@1-a")))
        await asyncio.sleep(0)
        names.point("policy", "policy@2-b", {"policy@2-b": 72})
        processor.free.set()
        refused = await asyncio.gather(by_label, return_exceptions=True)
        return (await by_name).lora_request.lora_name, type(refused[0])

    assert asyncio.run(ask()) == ("policy@2-b", UnknownModel)


def test_a_server_looks_versions_up_as_models(processor: Processor) -> None:
    own = Request("own", 1, "/somewhere")
    names, served = AdapterNames(processor), {"own": own}
    names.show(served, ["model"])
    names.point("policy", "policy@1-a", {"policy@1-a": 70})
    names.point("policy", "policy@2-b", {"policy@2-b": 71})
    assert {name: request.lora_int_id for name, request in served.items()} == {"own": 1, "policy": 71, "policy@2-b": 71}
    names.check("policy")
    for taken, said in (("model", "the model itself"), ("own", "loaded itself")):
        with pytest.raises(InvalidInput, match=said):
            names.check(taken)
    names.point("policy", "", {})
    assert served == {"own": own}


def config(**parallel: int) -> Any:
    usual = {"pipeline_parallel_size": 1, "_api_process_count": 1}
    model = SimpleNamespace(enable_sleep_mode=False)
    return SimpleNamespace(
        lora_config=object(), model_config=model, parallel_config=SimpleNamespace(**{**usual, **parallel})
    )


def test_which_vllms_have_no_adapters(processor: Processor) -> None:
    require_lora(config())
    plain = config()
    plain.lora_config = None
    sleeping = config()
    sleeping.model_config.enable_sleep_mode = True
    for without, hint in (
        (plain, "--enable-lora --max-loras 2"),
        (sleeping, "without --enable-sleep-mode"),
        (config(pipeline_parallel_size=2), "--pipeline-parallel-size 1"),
        (config(_api_process_count=2), "--api-server-count 1"),
    ):
        with pytest.raises(Unsupported) as refused:
            require_lora(without)
        assert hint in str(refused.value)
        assert "without adapter=" in str(refused.value)
        with pytest.raises(Unsupported):
            v0_32.Served(SimpleNamespace(vllm_config=without)).require_adapters()
    v0_32.Served(SimpleNamespace(vllm_config=config(), input_processor=processor)).require_adapters()
    with pytest.raises(UnknownModel, match="never published"):
        processor.process_inputs("r", lora_request=by("policy"))
    with pytest.raises(Unsupported, match=r"need vLLM 0\.32"):
        v0_27.Served(SimpleNamespace(vllm_config=config())).require_adapters()
