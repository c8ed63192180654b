"""Engines in real Ray actors of any class, published to by one publisher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from tests.examples.example_runs import learnt, run_example
from tests.frameworks.ray_actors import AsyncEngine, Engine
from transformers import AutoModelForCausalLM

from weightcast import Publisher
from weightcast.deadline import Deadline
from weightcast.errors import InvalidInput
from weightcast.testing.models import build_tiny_model
from weightcast.trainer.clients import RayEngineClient

ROUNDS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("ray") / "m", "qwen3", "float32")


@pytest.mark.usefixtures("cluster")
def test_actors_of_any_class_serve_what_was_published(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    waiting: Any = ray.remote(Engine).remote(str(folder))
    looping: Any = ray.remote(AsyncEngine).remote(str(folder))
    clients = [RayEngineClient(waiting), RayEngineClient(looping, attribute="worker.engine")]
    with Publisher(model, clients) as publisher:
        publisher.connect(wait_s=180)
        for _ in range(ROUNDS):
            with torch.no_grad():
                for value in model.parameters():
                    value.add_(torch.randn_like(value) * 0.05)
            report = publisher.publish()
            for actor in (waiting, looping):
                live = ray.get(actor.weights.remote())
                assert ray.get(actor.version.remote()) == report.version
                for name, value in model.named_parameters():
                    assert torch.equal(live[name], value), name
    with pytest.raises(InvalidInput, match="no engine in its attribute 'llm'"):
        RayEngineClient(looping).world_size(Deadline(30))


def test_openrlhfs_actors() -> None:
    assert learnt(run_example("openrlhf.py", timeout_s=300)) > 0.1
