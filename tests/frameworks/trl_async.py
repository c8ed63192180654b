"""TRL's AsyncGRPOTrainer on a CPU: stand-ins for its FA3 kernel and for its rollout process, and nothing else of it replaced."""

from __future__ import annotations

import itertools
import queue
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.frameworks.served import Served, even
from tests.frameworks.trl_runs import GROUP, PROMPTS
from torch.nn.functional import scaled_dot_product_attention


def attention_of_segments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_ends: torch.Tensor,
    key_ends: torch.Tensor,
    *_: Any,
    softmax_scale: float,
    **__: Any,
) -> torch.Tensor:
    """What FA3's varlen function computes: causal attention of each segment, whose last query sees the last key."""
    out = []
    queries, keys = itertools.pairwise(query_ends), itertools.pairwise(key_ends)
    for (q0, q1), (k0, k1) in zip(queries, keys, strict=True):
        num_queries, num_keys = int(q1 - q0), int(k1 - k0)
        sees = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
        q, k, v = query[q0:q1].transpose(0, 1), key[k0:k1].transpose(0, 1), value[k0:k1].transpose(0, 1)
        found = scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=sees, scale=softmax_scale, enable_gqa=True
        )
        out.append(found[0].transpose(0, 1))
    return torch.cat(out)


def on_a_cpu(patch: pytest.MonkeyPatch) -> None:
    """What TRL asks of a GPU without asking whether there is one."""
    from trl.experimental.async_grpo import packing

    patch.setattr(torch.cuda, "get_device_name", lambda *_: "CPU")
    patch.setattr(packing, "_flash_attn", lambda: SimpleNamespace(flash_attn_varlen_func=attention_of_segments))


class Rollouts:
    """TRL's ``RolloutWorkerProtocol`` on a thread: samples from the server, tagged with the version that TRL told last."""

    def __init__(self, served: Served) -> None:
        self.rollout_buffer: queue.Queue[Any] = queue.Queue(maxsize=4 * GROUP)
        self.metrics_queue: queue.Queue[Any] = queue.Queue()
        self._served, self._version, self._ended = served, 0, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join(30)

    def update_model_version(self, model_version: int) -> None:
        self._version = model_version

    def check_health(self, stale_after_s: float) -> None:
        assert self._thread.is_alive()

    def _run(self) -> None:
        for group in itertools.count():
            version, prompt = self._version, PROMPTS[group % len(PROMPTS)]
            answers = self._served.sample([prompt] * GROUP)
            rewards = np.array([even(answer) for answer in answers["completion_ids"]])
            for number, advantage in enumerate(rewards - rewards.mean()):
                sample = self._sample(answers, number, float(advantage), version, group)
                while not self._ended.is_set():
                    try:
                        self.rollout_buffer.put(sample, timeout=0.1)
                        break
                    except queue.Full:
                        continue
            if self._ended.is_set():
                return

    def _sample(self, answers: dict[str, Any], number: int, advantage: float, version: int, group: int) -> Any:
        from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

        prompt, answer = answers["prompt_ids"][number], answers["completion_ids"][number]
        return RolloutSample(
            prompt=[],
            completion=[],
            input_ids=np.array([*prompt, *answer]),
            completion_mask=np.array([0] * len(prompt) + [1] * len(answer)),
            old_log_probs=np.array([0.0] * len(prompt) + answers["logprobs"][number]),
            advantage=advantage,
            model_version=version,
            group_id=group,
            metrics={},
        )
