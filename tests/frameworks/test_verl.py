"""verl: its manager syncs a trainer of two ranks by weightcast, which only its config names."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import ray
from tests.frameworks.served import Served
from tests.frameworks.verl_server import Server

from weightcast.errors import StateError

SYNCS = 3


@pytest.mark.usefixtures("cluster")
def test_verl_syncs_by_its_config_alone(served: Served, tmp_path: Path) -> None:
    from tests.frameworks import verl_actors
    from verl.checkpoint_engine.base import CheckpointEngineManager, CheckpointEngineWorker
    from verl.workers.config import CheckpointEngineConfig

    served.versions.clear()
    config = CheckpointEngineConfig(
        backend="weightcast",
        custom_backend_module="weightcast.integrations.verl",
        engine_kwargs={"weightcast": {"token": served.token}},
    )
    place = urlsplit(served.url)
    trainers = _group(2, verl_actors.Trainer, str(served.model), config)
    rollout = _group(1, CheckpointEngineWorker, verl_actors.rollout_config(config), None, verl_actors.ServerAdapter())
    replica = verl_actors.Replica(rollout.workers)
    manager = CheckpointEngineManager(config, trainers, [replica])
    with pytest.raises(ray.exceptions.RayTaskError, match="no actor of verl's that serves rollouts") as refused:
        manager.update_weights(global_steps=0)
    assert isinstance(refused.value, StateError)
    server = ray.remote(Server).options(name="vllm_server_0_0", num_cpus=0).remote(place.hostname, place.port)
    losses = []
    for step in range(1, SYNCS + 1):
        losses.append(trainers.learn()[0])
        metrics = manager.update_weights(global_steps=step)
        assert metrics["weightcast/nbytes"] > 0
        trainers.save(str(tmp_path / str(step)))
        served.holds(tmp_path / str(step))
    assert losses[-1] < losses[0]
    assert len(set(served.versions)) == SYNCS
    assert replica.asked[-1] == "resume_generation"
    for actor in (server, *trainers.workers, *rollout.workers):
        ray.kill(actor)


def _group(size: int, kind: type, *arguments: object) -> Any:
    from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup

    pool = RayResourcePool([size], use_gpu=False, max_colocate_count=1)
    return RayWorkerGroup(
        resource_pool=pool, ray_cls_with_init=RayClassWithInitArgs(ray.remote(kind), *arguments), device_name="cpu"
    )
