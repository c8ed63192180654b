"""Reinforcement learning with Ray: one trainer and several LLM engines, each an actor.

    python examples/rlhf.py [--engine embedded|vllm|sglang] [--engines 2] [--steps 8]

Each step all engines sample, the trainer learns from what they sampled, and one publish() brings all of them to the new version.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import ray
from policy import NUM_TOKENS, PROMPTS, Learner, build, on_a_cpu

from weightcast import Publisher
from weightcast.trainer.clients import RayEngineClient


class Engine:
    """Samples with whatever weights were published last. A RayEngineClient reaches its attribute ``llm``."""

    def __init__(self, kind: str, folder: str) -> None:
        if kind == "vllm":
            os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
            from vllm import LLM, SamplingParams

            self.llm: Any = LLM(
                folder,
                dtype="float32",
                enforce_eager=True,
                max_model_len=64,
                kv_cache_memory_bytes=64 << 20,
                weight_transfer_config={"backend": "weightcast"},
            )
        else:
            from weightcast.engines.embedded import LLM, SamplingParams

            self.llm = LLM(folder)
        self._params = SamplingParams(max_tokens=NUM_TOKENS, temperature=1.0, ignore_eos=True)

    def sample(self, prompts: list[list[int]]) -> tuple[list[list[int]], str]:
        """An answer to each prompt, and the version that gave them."""
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], self._params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs], self.llm.get_weight_version()


class SglangEngine:
    """The same with an ``sglang.Engine``, whose calls are others."""

    def __init__(self, folder: str) -> None:
        os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
        import sglang

        self.llm: Any = sglang.Engine(**on_a_cpu(folder))

    def sample(self, prompts: list[list[int]]) -> tuple[list[list[int]], str]:
        """An answer to each prompt, and the version that gave them."""
        params = {"max_new_tokens": NUM_TOKENS, "temperature": 1.0, "ignore_eos": True}
        answers = self.llm.generate(input_ids=prompts, sampling_params=params)
        (version,) = {answer["meta_info"]["weight_version"] for answer in answers}
        return [answer["output_ids"] for answer in answers], version


class Trainer:
    """Learns, and publishes what it learnt."""

    def __init__(self, folder: str, engines: list[Any]) -> None:
        self._learner = Learner(Path(folder))
        self._publisher = Publisher(self._learner.model, [RayEngineClient(engine) for engine in engines])

    def publish(self) -> str:
        """All engines serve the trainer's weights afterwards; returns their version."""
        report = self._publisher.publish()
        assert report.digests_match, report
        return report.version

    def step(self, prompts: list[list[int]], answers: list[list[int]]) -> float:
        return self._learner.step(prompts, answers)

    def close(self) -> None:
        self._publisher.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=("embedded", "vllm", "sglang"), default="embedded")
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    ray.init(
        num_cpus=options.engines + 1,
        include_dashboard=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}},
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(build(Path(scratch)))
        if options.engine == "sglang":
            engines = [ray.remote(SglangEngine).remote(folder) for _ in range(options.engines)]
        else:
            engines = [ray.remote(Engine).remote(options.engine, folder) for _ in range(options.engines)]
        ray.get([engine.__ray_ready__.remote() for engine in engines])  # loading may take longer than a publish() waits
        trainer = ray.remote(Trainer).remote(folder, engines)
        version, rewards = ray.get(trainer.publish.remote()), []
        for step in range(options.steps):
            sampled = ray.get([engine.sample.remote(PROMPTS) for engine in engines])
            assert {served for _, served in sampled} == {version}, "every engine samples with the published version"
            answers = [answer for part, _ in sampled for answer in part]
            rewards.append(ray.get(trainer.step.remote(PROMPTS * len(engines), answers)))
            version = ray.get(trainer.publish.remote())
            print(f"step {step}: reward {rewards[-1]:.2f}, {len(engines)} engines serve {version}")
        ray.get(trainer.close.remote())
    ray.shutdown()
    print(f"reward {rewards[0]:.2f} -> {rewards[-1]:.2f}")


if __name__ == "__main__":
    main()
