"""Hints about engines of other projects, told without these: the mistake, the hint, and the hint followed."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.support.mistakes import Mistake
from tests.support.scripted_vllm import ERAS, ScriptedLLM, ScriptedVllm
from torch import nn

from weightcast.deadline import Deadline
from weightcast.engines.sglang.derived import refuse_derived
from weightcast.engines.sglang.refused import REFUSED, refuse_settings
from weightcast.engines.stock.worker import StockWorker
from weightcast.engines.vllm.drafts import draft_of
from weightcast.engines.vllm.front import VllmControl
from weightcast.engines.vllm.parallelism import _refuse_drafts
from weightcast.errors import DeadlineExceeded, EngineError, StateError, Unsupported, WeightcastError
from weightcast.integrations.plug_points import plug_point
from weightcast.server.control import EngineCommitter, RoundOrder, pause_within
from weightcast.testing.scripted_engine import ScriptedEngine
from weightcast.trainer.clients.ray import RayEngineClient
from weightcast.vllm_protocol.nccl.trainer import VllmNativePublisher
from weightcast.weight_transfer.base import WorkerRank

OTHER_ENGINE = "with vLLM or with weightcast serve"


def _layer(**attributes: object) -> nn.Module:
    """A model of one layer that has these attributes."""
    layer = nn.Linear(2, 2)
    for name, value in attributes.items():
        setattr(layer, name, value)
    return nn.Sequential(layer)


class Fp8LinearMethod:
    """By its name a method that quantises."""


class UnquantizedLinearMethod:
    """By its name a method that does not."""


def _derives() -> nn.Module:
    model = _layer()
    model.post_load_weights = print  # type: ignore[assignment]
    return model


@pytest.mark.parametrize(
    ("make", "said", "hint"),
    [
        (_derives, "Sequential derives weights of others after loading", OTHER_ENGINE),
        (lambda: _layer(quant_method=Fp8LinearMethod()), r"0 is quantised \(Fp8LinearMethod\)", "without quantization"),
        (lambda: _layer(use_intel_amx_backend=True), "0 is packed for AMX", "on a GPU, or on a CPU without AMX"),
        (lambda: _layer(kept=torch.randn(3)), r"keeps tensors beside its weights: .*kept", OTHER_ENGINE),
    ],
)
def test_models_of_sglang_that_compute_with_more_than_their_parameters(
    make: Callable[[], nn.Module], said: str, hint: str
) -> None:
    Mistake(
        make=lambda: refuse_derived(make()), error=Unsupported, said=said, hint=hint,
        follow=lambda: refuse_derived(_layer(quant_method=UnquantizedLinearMethod(), use_intel_amx_backend=False)),
    ).play()  # fmt: skip


def _sglang(**settings: object) -> Any:
    usual = {refused.setting: refused.harmless for refused in REFUSED}
    return SimpleNamespace(**{**usual, "pp_size": 1, "nnodes": 1, **settings})


@pytest.mark.parametrize(
    ("settings", "said", "hint"),
    [
        ({"pp_size": 2, "nnodes": 2}, "a pipeline over several machines", "with --tp-size instead"),
        ({"enable_lora": True}, r"adapters \(LoRA\) is not supported .*enable_lora", "Start SGLang without it"),
        ({"tokenizer_worker_num": 2}, "several tokenizer processes", "--tokenizer-worker-num 1"),
    ],
)
def test_settings_of_sglang(settings: dict[str, object], said: str, hint: str) -> None:
    Mistake(
        make=lambda: refuse_settings(_sglang(**settings)), error=Unsupported, said=said, hint=hint,
        follow=lambda: refuse_settings(_sglang()),
    ).play()  # fmt: skip


def _speculating(method: str, *, stages: int = 1, draft: str = "float16") -> Any:
    """A vLLM worker that speculates."""
    models = [SimpleNamespace(dtype=dtype, model=dtype) for dtype in ("float16", draft)]
    config = SimpleNamespace(
        speculative_config=SimpleNamespace(method=method, draft_model_config=models[1]), model_config=models[0],
        parallel_config=SimpleNamespace(pipeline_parallel_size=stages),
    )  # fmt: skip
    return SimpleNamespace(vllm_config=config, get_draft_model=lambda: nn.Linear(1, 1))


def test_speculation_in_vllm() -> None:
    Mistake(
        make=lambda: _refuse_drafts(_speculating("eagle", stages=2).vllm_config), error=Unsupported,
        said=r"speculating with a model \(eagle\) and pipeline parallelism",
        hint=r"pipeline_parallel_size to 1, or speculate without a model \(ngram",
        follow=lambda: [_refuse_drafts(_speculating(*way).vllm_config) for way in (("eagle",), ("ngram",))],
    ).play()  # fmt: skip
    Mistake(
        make=lambda: draft_of(_speculating("draft_model", draft="float32")), error=Unsupported,
        said="a draft in float32 beside a model in float16", hint=r"in the type of the target \(--dtype\)",
        follow=lambda: draft_of(_speculating("draft_model")),
    ).play()  # fmt: skip


def test_a_server_that_is_not_up() -> None:
    control = VllmControl()
    for ask in (lambda: control.front, lambda: control.committer):
        Mistake(
            make=ask, error=EngineError, said="not up yet", hint="Ask again when it is",
        ).play()  # fmt: skip
    control.attach(ScriptedVllm())
    assert control.front
    assert control.committer


async def _committed(client: Any, number: int, **fields: Any) -> WeightcastError | None:
    """Attach to a server's engine and order a commit; its error."""
    control = VllmControl()
    control.attach(client)
    order = {"action": "commit", "epoch": 1, "round": number, "version": f"{number}-x", "timeout_s": 5.0, **fields}
    try:
        await control.carry_out(RoundOrder(**order))
    except WeightcastError as error:
        return error
    return None


@pytest.mark.parametrize("era", ERAS)
async def test_keys_and_values_that_vllm_does_not_forget(era: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client, control = ScriptedVllm(era=era), VllmControl()
    control.attach(client)
    engine: Any = control.front.port.engine

    async def refuse(reset_running_requests: bool = False) -> bool:
        return False

    with monkeypatch.context() as patch:
        patch.setattr(client, "reset_prefix_cache", refuse)
        with pytest.raises(EngineError, match="former weights computed") as caught:
            await engine.forget_cache()
    assert caught.value.hint == "Publish again when fewer requests are in flight"
    await engine.forget_cache()


async def test_a_pause_that_waits_for_long_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    client = ScriptedVllm()
    pause = client.pause_generation
    monkeypatch.setattr(client, "pause_generation", lambda **given: asyncio.Event().wait())
    error = await _committed(client, 1, pause="wait", timeout_s=2.0)
    assert isinstance(error, DeadlineExceeded)
    assert "pausing (mode wait) took longer than" in error.message
    assert error.hint == "Nothing was changed. Mode wait takes as long as the longest request; keep takes one step"
    assert client.versions == ["default"]
    monkeypatch.setattr(client, "pause_generation", pause)
    assert await _committed(client, 2, pause="keep", timeout_s=30.0) is None
    assert client.versions == ["2-x"]


async def test_engines_that_stand_still_at_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """The route that pauses, in a server of weightcast's own."""
    engine = ScriptedEngine()
    pause = engine.pause_generation

    async def long(*_: object) -> None:
        await asyncio.sleep(3600)

    monkeypatch.setattr(engine, "pause_generation", long)
    with pytest.raises(DeadlineExceeded, match=r"pausing \(mode wait\) took longer.*keep takes one step"):
        await pause_within(engine, "wait", False, Deadline(1))
    assert not await engine.is_paused()
    monkeypatch.setattr(engine, "pause_generation", pause)
    await pause_within(engine, "keep", False, Deadline(30))
    assert await engine.is_paused()


async def test_an_engine_without_sleep_and_adapters() -> None:
    control = EngineCommitter(ScriptedEngine())
    with pytest.raises(Unsupported, match="cannot sleep") as caught:
        await control.wake(["weights"])
    assert "--enable-sleep-mode" in str(caught.value.hint)
    assert "--enable-memory-saver" in str(caught.value.hint)
    for call in (
        control.init({"adapter": "policy"}),
        control.carry_out(RoundOrder(action="rollback", epoch=1, round=1, adapter="policy")),
    ):
        with pytest.raises(Unsupported, match="without adapter="):
            await call


def test_a_question_to_a_worker_that_sleeps() -> None:
    asleep = "its weights are unmapped"
    model: Any = SimpleNamespace(why_asleep=lambda: asleep, checksums=lambda: {"w": "1"})
    worker = StockWorker(WorkerRank(rank=0, world_size=1), lambda: model)
    error = worker.call("checksums", {})["error"]
    assert (error["kind"], error["message"]) == ("StateError", f"the engine is asleep: {asleep}")
    assert error["hint"] == "Wake its weights up, then ask again"
    asleep = ""
    answer = worker.call("checksums", {})
    assert answer["error"] is None
    assert answer["checksums"] == {"w": "1"}


def test_an_llm_that_is_held_says_what_lets_it_go_on() -> None:
    from weightcast.vllm_protocol.eras.base import OfflineEngine

    llm: Any = ScriptedLLM()
    engine: Any = SimpleNamespace(llm=llm)
    OfflineEngine.refuse(engine, "worker 0 has half a round")
    Mistake(
        make=lambda: llm.generate("x"), error=StateError, said="worker 0 has half a round",
        hint=r"The next publish\(\) that succeeds heals it",
    ).play()  # fmt: skip
    OfflineEngine.accept(engine)
    llm.generate("x")
    llm.reset_prefix_cache = lambda: False
    Mistake(
        make=lambda: OfflineEngine.forget_cache(engine), error=EngineError, said="vLLM keeps keys and values",
        hint="No request may be in flight while weights change",
    ).play()  # fmt: skip


class GetTimeoutError(Exception):
    """By the name of Ray's."""


def test_an_actor_that_does_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[dict[str, int]] = []

    def get(call: object, timeout: float) -> dict[str, int]:
        if not done:
            raise GetTimeoutError
        return done[0]

    errors = SimpleNamespace(GetTimeoutError=GetTimeoutError, RayActorError=ConnectionError)
    ray = SimpleNamespace(wait=lambda calls, timeout: (done, calls), get=get, exceptions=errors)
    monkeypatch.setitem(sys.modules, "ray", ray)
    client = RayEngineClient(SimpleNamespace(__ray_call__=print))  # type: ignore[arg-type]
    Mistake(
        make=lambda: client._result("status", object(), Deadline(0.05)), error=DeadlineExceeded, said="status",
        hint="is it still generating, or loading its model",
        follow=lambda: (done.append({"value": 1}), client._result("status", object(), Deadline(5))),
    ).play()  # fmt: skip


def test_plug_points_that_are_missing() -> None:
    def find(place: str, package: str, *members: str) -> object:
        return plug_point(place, package=package, wanted="torch>=2.9", members=members)

    for place, package, members, said in (
        ("no_such_library.part:Thing", "no-such-library", (), "no-such-library is not installed"),
        ("torch.nn:NoThing", "torch", (), r"torch \S+ has no torch.nn:NoThing"),
        ("torch.nn:Module", "torch", ("forward", "fly"), r"torch \S+ has no torch.nn:Module.fly"),
    ):
        Mistake(
            make=lambda place=place, package=package, members=members: find(place, package, *members),  # type: ignore[misc]
            error=Unsupported, said=said, hint=r"pip install 'torch>=2\.9'",
            follow=lambda: find("torch.nn:Module", "torch", "forward"),
        ).play()  # fmt: skip


def test_vllms_own_transfer_has_to_be_connected_and_keeps_its_form() -> None:
    publisher = VllmNativePublisher.__new__(VllmNativePublisher)
    publisher._comm = None
    Mistake(
        make=publisher.publish, error=StateError, said="not connected to the server", hint=r"connect\(\) first"
    ).play()
    Mistake(
        make=lambda: VllmNativePublisher({"w": torch.randn(2)}, "http://127.0.0.1:9"), error=Unsupported,
        said="all tensors on one GPU", hint="Gather them there first",
    ).play()  # fmt: skip
