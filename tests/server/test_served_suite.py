"""``weightcast serve`` passes the conformance suite of engines."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from serve_process import serving
from tests.support.completions import streamed
from tests.support.forked import run_forked

from weightcast.testing.engine_suite import Answer, EngineSuite, Running
from weightcast.testing.vllm_server import Served

DOOMED = "from weightcast.testing.doomed_trainer import main; main()"


class TestEmbedded(EngineSuite):
    @pytest.fixture(scope="class")
    @classmethod
    def running(cls, model: Path) -> Iterator[Served]:
        token = secrets.token_hex(8)
        with serving(model, model.parent, "--token", token, "--served-model-name", "policy") as server:
            yield Served(server.url, token, server.ready_file, 0)

    def stream(self, running: Running, ids: list[int], num_tokens: int) -> Iterator[Answer]:
        assert isinstance(running, Served)
        return streamed(running, ids, num_tokens)

    def killed(self, running: Running, checkpoint: Path, moment: str) -> int:
        """Without the seconds of importing torch."""
        words = (str(checkpoint), running.url, running.token, moment)
        status, printed = run_forked(DOOMED, *words, environment=dict(os.environ), timeout_s=60)
        print(printed)
        return status
