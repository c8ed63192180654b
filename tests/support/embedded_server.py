"""``weightcast serve`` beside another engine's server."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weightcast.testing.ports import free_port
from weightcast.testing.vllm_server import Served, wait_healthy


@contextmanager
def embedded_server(model: Path, token: str) -> Iterator[Served]:
    """``weightcast serve`` of the model."""
    port = free_port()
    command = [
        str(Path(sys.executable).parent / "weightcast"), "serve", str(model), "--port", str(port), "--token", token,
        "--served-model-name", "policy",
    ]  # fmt: skip
    log = model.parent / f"embedded-{port}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_healthy(process, f"http://127.0.0.1:{port}", log)
        yield Served(f"http://127.0.0.1:{port}", token, log, process.pid)
    finally:
        process.kill()
        process.wait(10)
