"""A served vLLM passes the conformance suite of engines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tests.support.completions import streamed

from weightcast.testing.engine_suite import NEVER_ENDING, Answer, EngineSuite, Running
from weightcast.testing.vllm_server import Served, vllm_server


class TestVllm(EngineSuite):
    near = 0.25  # on a CPU, vLLM's attention multiplies in bfloat16
    options: ClassVar[Mapping[str, Any]] = {"head_dim": 32}
    cannot: ClassVar[Mapping[str, str]] = {
        "test_outputs_say_which_version_made_them": "vLLM's HTTP answers have no place for versions (engine objects say them)"
    }

    @pytest.fixture(scope="class")
    @classmethod
    def running(cls, model: Path) -> Iterator[Served]:
        with vllm_server(model, max_model_len=NEVER_ENDING + 64, kv_cache_nbytes=64 << 20) as running:
            yield running

    def stream(self, running: Running, ids: list[int], num_tokens: int) -> Iterator[Answer]:
        assert isinstance(running, Served)
        return streamed(running, ids, num_tokens)
