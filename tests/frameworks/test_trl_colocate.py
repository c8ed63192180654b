"""TRL's colocate mode with an engine that sleeps: TRL's own class makes, syncs and asks the engine, which stands in for vLLM's ``LLM``."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from tests.support.sleepy_llm import SleepyLLM, told_by
from torch import nn
from trl.generation import vllm_generation

from weightcast.errors import RoundFailed, Unsupported
from weightcast.integrations.trl import use_in_colocate_mode
from weightcast.receiver.session import Session
from weightcast.testing.ranks import run_ranks

SYNCED = ["wake weights", "commit"]
GENERATED = ["wake kv_cache", "generate", "sleep 2"]


def policy() -> nn.Module:
    model = nn.Sequential(nn.Linear(33, 65), nn.Linear(65, 7))
    model.name_or_path = "policy"  # type: ignore[assignment]
    return model


@pytest.fixture
def trl(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)  # TRL sets it, for vLLM
    return beside_vllm(monkeypatch)


def beside_vllm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """TRL as it is beside vLLM, with its one call made."""
    patch = monkeypatch.setattr
    patch(vllm_generation, "is_vllm_available", lambda **_: True)
    patch(vllm_generation, "SamplingParams", SimpleNamespace, raising=False)
    patch(vllm_generation, "LLM", lambda **given: SleepyLLM(policy().state_dict(), **given), raising=False)
    patch(vllm_generation.VLLMGeneration, "sync_weights", vllm_generation.VLLMGeneration.sync_weights)
    for _ in range(2):
        use_in_colocate_mode(timeout_s=20)
    return vllm_generation.VLLMGeneration


def generation_of(trl: Any, model: nn.Module, **options: Any) -> Any:
    return trl(model, Accelerator(cpu=True), None, mode="colocate", **options)


def answers(generation: Any) -> set[int]:
    _, completions, _, _ = generation.generate([[1, 2], [3]], None, 1)
    return {token for ids in completions for token in ids}


def train(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))


def test_trls_own_sequence(trl: Any) -> None:
    model = policy()
    generation = generation_of(trl, model, enable_sleep_mode=True)
    llm = generation.llm
    assert (llm.said, llm.options["distributed_executor_backend"]) == (["sleep 2"], "external_launcher")
    versions = set()
    for _ in range(3):
        llm.said.clear()
        train(model)
        report = generation.sync_weights()
        assert (report.digests_match, report.mode) == (True, "in_place")
        assert llm.asleep == {"kv_cache"}, "keys and values get their memory when they are needed"
        assert answers(generation) == {told_by(dict(model.named_parameters()))}
        assert llm.said == [*SYNCED, *GENERATED]
        versions.add(report.version)
        # No step was taken: TRL asks for the same weights again, which were lost in the sleep.
        assert answers(generation) == {told_by(dict(model.named_parameters()))}
        assert llm.said == 2 * [*SYNCED, *GENERATED]
    assert len(versions) == 3


def test_a_sync_that_fails_is_made_up_for(trl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = policy()
    generation = generation_of(trl, model, enable_sleep_mode=True)
    generation.sync_weights()
    answers(generation)
    receive = Session.receive

    def torn(*arguments: Any) -> Any:
        receive(*arguments)
        raise RuntimeError("torn")

    train(model)
    with monkeypatch.context() as patch:
        patch.setattr(Session, "receive", torn)
        with pytest.raises(RoundFailed, match="torn"):
            generation.sync_weights()
        with pytest.raises(RoundFailed, match="torn"):
            answers(generation)
    assert generation.llm.asleep == {"kv_cache"}
    assert answers(generation) == {told_by(dict(model.named_parameters()))}


def test_an_engine_that_never_sleeps(trl: Any) -> None:
    model = policy()
    generation = generation_of(trl, model)
    for _ in range(2):
        train(model)
        assert generation.sync_weights().digests_match
        assert answers(generation) == {told_by(dict(model.named_parameters()))}
    assert generation.llm.said == 2 * ["commit", "generate"]


def test_what_cannot_be_is_told_and_nothing_is_kept(trl: Any) -> None:
    generation = generation_of(trl, policy())
    generation.tensor_parallel_size = 2
    with pytest.raises(Unsupported, match="no process reaches all of them"):
        generation.sync_weights()
    generation.tensor_parallel_size = 1
    generation.sync_weights()
    kept = weakref.ref(generation)
    del generation
    gc.collect()
    assert kept() is None


def a_rank(rank: int, size: int, store: str) -> None:
    """Each process has an engine, and gathers with the others."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    with pytest.MonkeyPatch.context() as patch:
        model = policy()
        generation = generation_of(beside_vllm(patch), model, enable_sleep_mode=True)
        own = type(generation)._iter_named_params

        def gathering(self: Any) -> Any:
            for name, value in own(self):
                dist.broadcast(value, 0)
                yield name, value

        patch.setattr(type(generation), "_iter_named_params", gathering)
        for _ in range(3):
            train(model)
            assert generation.sync_weights().digests_match
            assert answers(generation) == {told_by(dict(model.named_parameters()))}
        told: list[Any] = [None] * size
        dist.all_gather_object(told, told_by(dict(model.named_parameters())))
        assert len(set(told)) == 1
        assert generation.llm.said == ["sleep 2", *(3 * [*SYNCED, *GENERATED])]
    dist.destroy_process_group()


def test_every_process_publishes_to_its_own_engine(tmp_path: Path) -> None:
    run_ranks(a_rank, 2, str(tmp_path / "store"), timeout_s=120)
