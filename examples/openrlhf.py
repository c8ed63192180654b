"""OpenRLHF's actors, with weightcast in the place of ``broadcast_to_vllm``.

    python examples/openrlhf.py [--steps 8]

Rollout actors and policy actors are as OpenRLHF 0.11.2 has them, and small: an engine on the event loop of an actor in ``self.llm``, and a policy
that may be under DeepSpeed's ZeRO-3. The five lines that change are marked.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
from pathlib import Path
from typing import Any

import ray
from policy import NUM_TOKENS, PROMPTS, Learner, build

from weightcast import Publisher
from weightcast.integrations.deepspeed import gathered
from weightcast.trainer.clients import RayEngineClient


class RolloutRayActor:
    """Answers prompts. OpenRLHF makes vLLM's engine here; give it weight_transfer_config={"backend": "weightcast"}."""

    async def __init__(self, folder: str) -> None:
        from weightcast.engines.embedded import AsyncLLM, SamplingParams

        self.llm = AsyncLLM(folder)
        self._params = SamplingParams(max_tokens=NUM_TOKENS, temperature=1.0, ignore_eos=True)

    async def generate(self, number: int, prompt: list[int]) -> list[int]:
        stream = self.llm.generate({"prompt_token_ids": prompt}, self._params, f"request-{number}")
        return list([output async for output in stream][-1].outputs[0].token_ids)

    async def generate_responses(self, prompts: list[list[int]]) -> list[list[int]]:
        return list(await asyncio.gather(*(self.generate(*numbered) for numbered in enumerate(prompts))))

    async def version(self) -> str:
        return await self.llm.get_weight_version()


class PolicyModelActor:
    """Learns. ``group`` is the trainer's process group where it has several ranks, each of which makes a Publisher."""

    def __init__(self, folder: str, vllm_engines: list[Any], group: Any = None) -> None:
        self.actor = Learner(Path(folder))
        engines = [RayEngineClient(actor, attribute="llm") for actor in vllm_engines]  # 1
        self.publisher = Publisher(lambda: gathered(self.actor.model), engines, process_group=group)  # 2
        self.publisher.connect(wait_s=120)  # 3

    def broadcast_to_vllm(self) -> str:
        return self.publisher.publish().version  # 4

    def fit(self, prompts: list[list[int]], answers: list[list[int]]) -> float:
        return self.actor.step(prompts, answers)

    def close(self) -> None:
        self.publisher.close()  # 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": environment})
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(build(Path(scratch)))
        rollout = ray.remote(RolloutRayActor).remote(folder)
        policy = ray.remote(PolicyModelActor).remote(folder, [rollout])
        rewards = []
        for step in range(options.steps):
            version = ray.get(policy.broadcast_to_vllm.remote())
            assert ray.get(rollout.version.remote()) == version
            answers = ray.get(rollout.generate_responses.remote(PROMPTS))
            rewards.append(ray.get(policy.fit.remote(PROMPTS, answers)))
            print(f"step {step}: reward {rewards[-1]:.2f} with {version}")
        ray.get(policy.close.remote())
    ray.shutdown()
    print(f"reward {rewards[0]:.2f} -> {rewards[-1]:.2f}")


if __name__ == "__main__":
    main()
