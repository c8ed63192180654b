"""The embedded engine in a process of its own, and what a Publisher calls it by."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from weightcast.testing.ranks import Peer

PROMPTS = [[5, 17, 33, 2, 90], [44, 45, 46], list(range(60, 100)), [7]]
NUM_TOKENS = 24


def own_host() -> None:
    """NCCL takes two ranks on one GPU only where they call themselves different hosts."""
    os.environ["NCCL_HOSTID"] = f"llm-{os.getpid()}"
    os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    os.environ["NCCL_RAS_ENABLE"] = "0"


class LlmSide:
    """What lives in the process."""

    def __init__(self) -> None:
        own_host()

    def start(self, folder: str, device: str, options: dict[str, Any]) -> None:
        from weightcast.engines.embedded import LLM

        self.llm = LLM(folder, device=device, num_threads=1, max_num_seqs=8, max_model_len=200, **options)

    def make(self, method: str, *args: Any) -> Any:
        return getattr(self.llm, method)(*args)

    def tokens(self) -> list[list[int]]:
        from weightcast.engines.embedded import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
        return [list(output.outputs[0].token_ids) for output in self.llm.generate(PROMPTS, params)]


class PipedLlm:
    """vLLM's names for an LLM in another process. A context manager."""

    def __init__(self, folder: Path, device: str, **options: Any) -> None:
        self.peer = Peer(LlmSide)
        self.peer.call("start", str(folder), device, options, timeout_s=90)

    def get_world_size(self) -> int:
        return int(self._make("get_world_size"))

    def init_weight_transfer_engine(self, init_info: Any, /) -> None:
        self._make("init_weight_transfer_engine", init_info)

    def start_weight_update(self) -> None:
        self._make("start_weight_update")

    def update_weights(self, update_info: Any, /) -> None:
        self._make("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._make("finish_weight_update", weight_version)

    def shutdown_weight_transfer_engine(self) -> None:
        self._make("shutdown_weight_transfer_engine")

    def get_weight_version(self) -> str:
        return str(self._make("get_weight_version"))

    def status(self) -> Any:
        return self._make("status")

    def is_paused(self) -> bool:
        return bool(self._make("is_paused"))

    def pause_generation(self, mode: Any, clear_cache: bool, /) -> None:
        self._make("pause_generation", mode, clear_cache)

    def resume_generation(self) -> None:
        self._make("resume_generation")

    def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        return bool(self._make("reset_prefix_cache", reset_running_requests))

    def tokens(self) -> list[list[int]]:
        return self.peer.call("tokens", timeout_s=90)

    def _make(self, method: str, *args: Any) -> Any:
        return self.peer.call("make", method, *args, timeout_s=90)

    def __enter__(self) -> PipedLlm:
        return self

    def __exit__(self, *_: object) -> None:
        self.peer.__exit__(None, None, None)
