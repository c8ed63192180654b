"""SGLang servers on a CPU, with weightcast beside them, and what they answer."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx

from weightcast.testing.ports import free_port
from weightcast.testing.vllm_server import wait_healthy

MODELS = {"llama", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "gemma2", "gemma3_causal"}
"""Modules of SGLang's that the tests serve; importing all two hundred takes each process ten seconds."""
HELPERS = {"registry", "utils", "transformers"}
HTTP = httpx.Client(timeout=60, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))


def environment(**more: str) -> dict[str, str]:
    """What a server on a CPU needs."""
    found = find_spec("sglang")
    assert found is not None
    assert found.origin is not None
    names = {path.stem for path in (Path(found.origin).parent / "srt" / "models").glob("*.py")}
    return os.environ | {
        "SGLANG_USE_CPU_ENGINE": "1",
        "SGLANG_DISABLED_MODEL_ARCHS": ",".join(sorted(names - MODELS - HELPERS)),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        **more,
    }


def arguments(model: Path, port: int, *options: str) -> list[str]:
    return [
        "--model-path", str(model), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu",
        "--attention-backend", "torch_native", "--sampling-backend", "pytorch", "--disable-cuda-graph", "--dtype", "float32",
        "--mem-fraction-static", "0.2", "--max-total-tokens", "4096", "--max-running-requests", "8", "--context-length", "1024",
        "--sleep-on-idle", "--skip-server-warmup", *options,
    ]  # fmt: skip


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    token: str
    log: Path
    pid: int

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def get(self, path: str, **options: Any) -> httpx.Response:
        return HTTP.get(self.url + path, **options)

    def post(self, path: str, json: Any = None, **options: Any) -> httpx.Response:
        return HTTP.post(self.url + path, json=json, **options)

    def generate(self, ids: list[int], num_tokens: int = 12) -> dict[str, Any]:
        """A greedy answer to token ids."""
        response = self.post("/generate", _request(ids, num_tokens))
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def stream(self, ids: list[int], num_tokens: int) -> Iterator[dict[str, Any]]:
        """A greedy answer as it is made; each part has all tokens so far."""
        body = {**_request(ids, num_tokens), "stream": True}
        with HTTP.stream("POST", self.url + "/generate", json=body) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                data = line.removeprefix("data: ")
                if data and data != "[DONE]":
                    yield json.loads(data)

    def answers(self, prompts: list[list[int]]) -> list[list[int]]:
        return [self.generate(ids)["output_ids"] for ids in prompts]

    @property
    def version(self) -> str:
        """What SGLang says that it serves."""
        return str(self.get("/model_info").json()["weight_version"])

    @property
    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self.get("/weightcast/status").json()
        return status

    def checksums(self) -> list[dict[str, str]]:
        """SGLang's own checksums of the live parameters, for each rank of the first replica."""
        answer = self.post("/weights_checker", {"action": "checksum"}).json()
        assert answer["success"], answer
        return [rank["checksums"] for rank in answer["ranks"]]

    def load_from(self, checkpoint: Path) -> None:
        """Have SGLang's own loader load a checkpoint."""
        answer = self.post("/update_weights_from_disk", {"model_path": str(checkpoint)}).json()
        assert answer["success"], answer


def _request(ids: list[int], num_tokens: int) -> dict[str, Any]:
    params = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
    return {"input_ids": ids, "sampling_params": params}


class Launcher:
    """Starts servers by forking a process that has imported SGLang (see launcher.py)."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.sglang.launcher"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment(),
        )
        self._answer("ready")

    @contextmanager
    def server(self, model: Path, *options: str, env: Mapping[str, str] | None = None) -> Iterator[Server]:
        """Start, wait until requests are answered, and end the whole process group afterwards."""
        port, token = free_port(), secrets.token_hex(8)
        log = model.parent / f"sglang-{port}.log"
        pid = self._start(arguments(model, port, *options), {"WEIGHTCAST_TOKEN": token, **(env or {})}, log)
        try:
            server = Server(f"http://127.0.0.1:{port}", token, log, pid)
            wait_there(server)
            yield server
        finally:
            os.killpg(pid, signal.SIGKILL)
            self.wait(pid)

    def run(self, function: str, *argv: str, log: Path) -> int:
        """Run ``module:function`` with these arguments in a process of its own, and return the process's id."""
        return self._start(list(argv), {}, log, run=function)

    def wait(self, pid: int) -> int:
        """What a process ended with: its exit code, or a signal's number below zero."""
        return self._ask({"wait": pid})

    def _start(self, argv: list[str], env: dict[str, str], log: Path, **more: str) -> int:
        return self._ask({"argv": argv, "env": env, "log": str(log), **more})

    def _ask(self, wanted: dict[str, Any]) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(wanted) + "\n")
        self._process.stdin.flush()
        return int(self._answer())

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _answer(self, wanted: str = "") -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip() == wanted or (not wanted and line.strip().lstrip("-").isdecimal()):
                return line.strip()
        raise AssertionError(f"the process that starts servers ended with {self._process.wait()}")


def wait_there(server: Server) -> None:
    end = time.monotonic() + 240
    while time.monotonic() < end:
        try:
            os.kill(server.pid, 0)
            if server.get("/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"the server did not come up:\n{server.log.read_text(errors='replace')[-4000:]}")


@contextmanager
def started_server(model: Path, *options: str, env: Mapping[str, str] | None = None) -> Iterator[Server]:
    """A server that is started the usual way, by ``sglang serve``."""
    port, token = free_port(), secrets.token_hex(8)
    log = model.parent / f"sglang-{port}.log"
    command = [str(Path(sys.executable).parent / "sglang"), "serve", *arguments(model, port, *options)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment(WEIGHTCAST_TOKEN=token, **(env or {})), stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    try:
        wait_healthy(process, f"http://127.0.0.1:{port}", log)
        yield Server(f"http://127.0.0.1:{port}", token, log, process.pid)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
