"""NeMo-RL: what its factory makes of weightcast's class, driven in the order in which NeMo-RL's synchronizer calls it.

NeMo-RL is not on PyPI: a clone of NVIDIA-NeMo/RL on PYTHONPATH, or its folder nemo_rl/utils/checkpoint_engines alone, lets this run.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.frameworks.served import Served
from transformers import AutoModelForCausalLM

from weightcast.testing.models import build_tiny_model

REFITS = 3
BACKEND = "weightcast.integrations.nemo_rl:WeightcastCheckpointEngine"
TOPOLOGY: dict[str, Any] = {"train_world_size": 2, "rollout_world_size": 1, "metadata": [{"rank": 0}] * 3}
pytestmark = pytest.mark.skipif(find_spec("nemo_rl") is None, reason="NeMo-RL is not on PyPI")


def made(**kwargs: Any) -> Any:
    """A checkpoint engine as NeMo-RL makes one from its config."""
    from nemo_rl.utils.checkpoint_engines.base import create_checkpoint_engine

    given = {"release_after_refit": False, **kwargs}
    return create_checkpoint_engine(BACKEND, bucket_size_bytes=2**20, engine_kwargs=given)


def yielded(model: torch.nn.Module, seen: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor in one buffer that is used again; ``seen`` gets the names."""
    buffer = torch.empty(max(value.numel() for value in model.parameters()))
    for name, value in model.named_parameters():
        whole = buffer[: value.numel()].view(value.shape)
        whole.copy_(value.detach())
        seen.append(name)
        yield name, whole
        buffer.fill_(torch.nan)


async def refit(ranks: list[Any], rollout: Any, model: torch.nn.Module) -> None:
    seen: list[list[str]] = [[] for _ in ranks]
    for rank, names in zip(ranks, seen, strict=True):
        await rank.send_weights(yielded(model, names))
    assert len({tuple(names) for names in seen}) == 1, "every rank gathers to the end"
    batches: AsyncIterator[Any] = rollout.receive_weight_batches()
    assert [batch async for batch in batches] == []


def learn(model: torch.nn.Module) -> None:
    tokens = torch.arange(20, 44)[None]
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    with torch.no_grad():
        for value in model.parameters():
            value -= 0.1 * value.grad
            value.grad = None


@pytest.mark.parametrize("release", [False, True])
def test_refits_reach_a_server(served: Served, release: bool) -> None:
    served.versions.clear()
    model = AutoModelForCausalLM.from_pretrained(served.model, dtype=torch.float32)
    engines = [made(engines=[served.url], token=served.token) for _ in range(3)]
    for _ in range(REFITS):
        assert [engine.prepare() for engine in engines] == [{}, {}, {}]
        for rank, engine in enumerate(engines[:2]):
            engine.init_policy_process_group(worker_rank=rank, **TOPOLOGY)
        engines[2].init_rollout_process_group(rollout_rank=0, **TOPOLOGY)
        learn(model)
        asyncio.run(refit(engines[:2], engines[2], model))
        served.holds_model(model)
        if release:
            engines[0].finalize()
    engines[0].finalize()
    assert len(set(served.versions)) == REFITS


@pytest.mark.usefixtures("cluster")
def test_refits_reach_the_actors_that_generate(tmp_path: Path) -> None:
    import ray
    from tests.frameworks.ray_actors import Engine

    from weightcast.errors import StateError

    folder = build_tiny_model(tmp_path / "m", "qwen3", "float32")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    engine = made(wait_s=180)
    with pytest.raises(StateError, match="no actor whose name begins with 'vllm_policy'"):
        engine.init_policy_process_group(worker_rank=0, **TOPOLOGY)
    actor: Any = ray.remote(Engine).options(name="vllm_policy-0-0").remote(str(folder))
    engine.init_policy_process_group(worker_rank=0, **TOPOLOGY)
    for _ in range(REFITS):
        learn(model)
        asyncio.run(engine.send_weights(yielded(model, [])))
        live = ray.get(actor.weights.remote())
        assert all(torch.equal(live[name], value) for name, value in model.named_parameters())
    engine.finalize()
    ray.kill(actor)
