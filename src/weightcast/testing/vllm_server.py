"""A stock vLLM server in a process group of its own, with weightcast beside it; for tests and benchmarks."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from weightcast.testing.ports import free_port

START_TIMEOUT_S = 240.0
BACKEND = ("--weight-transfer-config", '{"backend": "weightcast"}')

# One client for all: making one reads every root certificate, and beside a server that spins on all cores that can take
# seconds. Connections are not kept, since a server that ends an idle one could meet the next request.
_HTTP = httpx.Client(timeout=120, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))


@dataclass(frozen=True)
class Served:
    """A running server."""

    url: str
    token: str
    log: Path
    pid: int

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def get(self, path: str, **options: Any) -> httpx.Response:
        return _HTTP.get(self.url + path, **options)

    def post(self, path: str, json: Any = None, **options: Any) -> httpx.Response:
        return _HTTP.post(self.url + path, json=json, **options)

    def complete(self, ids: list[int], max_tokens: int = 12, **fields: Any) -> dict[str, Any]:
        """Return the first choice of a greedy completion with log-probabilities."""
        response = self.post("/v1/completions", {**_request(ids, max_tokens), "logprobs": 0, **fields})
        assert response.status_code == 200, response.text
        choice: dict[str, Any] = response.json()["choices"][0]
        return choice

    def stream(self, ids: list[int], max_tokens: int) -> Iterator[dict[str, Any]]:
        """Yield the parts of the first choice of a greedy completion as they are made."""
        body = {**_request(ids, max_tokens), "stream": True}
        with _HTTP.stream("POST", self.url + "/v1/completions", json=body) as response:
            assert response.status_code == 200, response.read()
            for line in lines_of(response):
                data = line.removeprefix(b"data: ")
                if data and data != b"[DONE]":
                    yield from json.loads(data)["choices"][:1]

    def answers(self, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
        """Return tokens and log-probabilities for each prompt."""
        choices = [self.complete(ids) for ids in prompts]
        return [(choice["token_ids"], choice["logprobs"]["token_logprobs"]) for choice in choices]

    @property
    def version(self) -> str:
        return str(self.get("/weight_info").json()["weight_version"])

    def tokens_made(self) -> int:
        """Return how many tokens the server has generated since it started."""
        found = re.search(r"^vllm:generation_tokens_total\{.*\} (\S+)$", self.get("/metrics").text, re.MULTILINE)
        assert found is not None
        return int(float(found.group(1)))


def lines_of(response: httpx.Response) -> Iterator[bytes]:
    """Yield the lines of a stream of events. Texts in the events may have other line breaks of Unicode's, which httpx would cut at."""
    rest = b""
    for part in response.iter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        yield from (line.rstrip(b"\r") for line in lines)
    yield rest


def _request(ids: list[int], max_tokens: int) -> dict[str, Any]:
    return {
        "model": "policy",
        "prompt": ids,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


@contextmanager
def vllm_server(
    model: Path,
    *options: str,
    env: Mapping[str, str] | None = None,
    max_model_len: int = 256,
    kv_cache_nbytes: int = 32 << 20,
    backend: Sequence[str] = BACKEND,
    programs: Path | None = None,
) -> Iterator[Served]:
    """Start a server, wait until the server is healthy, and end the whole process group afterwards.

    ``programs`` is the folder of vLLM's command; None means that of this process's Python.
    """
    port, token = free_port(), secrets.token_hex(8)
    log = model.parent / f"server-{port}.log"
    command = [
        str((programs or Path(sys.executable).parent) / "vllm"), "serve", str(model),
        "--served-model-name", "policy", "--host", "127.0.0.1", "--port", str(port),
        "--enforce-eager", "--max-model-len", str(max_model_len), "--max-num-seqs", "8",
        "--kv-cache-memory-bytes", str(kv_cache_nbytes), "--no-enable-log-requests",
        *backend, *options,
    ]  # fmt: skip
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "WEIGHTCAST_TOKEN": token,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        **(env or {}),
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_healthy(process, f"http://127.0.0.1:{port}", log)
        yield Served(f"http://127.0.0.1:{port}", token, log, process.pid)
    finally:
        _end(process)


def wait_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Wait until a server of either kind answers. AssertionError has the end of the server's log when the server does not come up."""
    end = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            if _HTTP.get(url + "/health", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.3)
    raise AssertionError(f"the server did not come up:\n{log.read_text(errors='replace')[-6000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    for number, patience_s in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue
        if number == signal.SIGTERM:
            time.sleep(0.5)
