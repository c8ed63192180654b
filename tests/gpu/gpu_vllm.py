"""vLLM engines on a GPU: objects in this process, and servers in processes of their own."""

from __future__ import annotations

import gc
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch

from weightcast.testing.models import build_tiny_model
from weightcast.testing.ports import free_port

PROMPTS = [[5, 17, 33, 2, 90], [44, 45, 46], list(range(60, 100)), [7]]
NUM_TOKENS = 16
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4]}
"""CUDA graphs of whole decode steps, without torch.compile, which would take a minute."""
DIMENSIONS = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
START_TIMEOUT_S = 110.0


def tiny_model(folder: Path, arch: str) -> Path:
    """A tiny model of dimensions that GPU kernels take."""
    more = {"moe_intermediate_size": 128, "num_experts": 8} if "moe" in arch else {}
    return build_tiny_model(folder, arch, "bfloat16", **DIMENSIONS, **more)


@contextmanager
def engine(path: Path, **options: Any) -> Iterator[Any]:
    """A ``vllm.LLM`` with the weightcast backend and CUDA graphs."""
    from vllm import LLM

    arguments = {
        "max_model_len": 256,
        "max_num_seqs": 4,
        "kv_cache_memory_bytes": 64 << 20,
        "gpu_memory_utilization": 0.1,
        "weight_transfer_config": {"backend": "weightcast"},
        "compilation_config": GRAPHS,
        "disable_log_stats": True,
        "skip_tokenizer_init": True,
    }
    llm = LLM(model=str(path), **(arguments | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        clean_up()


def clean_up() -> None:
    """What vLLM leaves in a process that held an engine."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
    gc.collect()
    torch.cuda.empty_cache()


def answers(llm: Any) -> list[list[int]]:
    """Greedy tokens of each prompt, one prompt at a time and then all at once."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
    single = [llm.generate([prompt], params, use_tqdm=False)[0] for prompt in prompts]
    return [list(output.outputs[0].token_ids) for output in [*single, *llm.generate(prompts, params, use_tqdm=False)]]


def through_loader(llm: Any) -> tuple[str, ...]:
    """Tensors without a direct landing, of an engine in this process."""
    worker = llm.llm_engine.model_executor.driver_worker.worker
    return tuple(worker.weight_transfer_engine.calls.engine.receiver._session.layout.through_loader)


class Server:
    """A process that serves HTTP; ended with its whole process group."""

    def __init__(self, command: Sequence[str], env: dict[str, str], log: Path, port: int) -> None:
        self.url, self.log = f"http://127.0.0.1:{port}", log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command, env=os.environ | env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self, timeout_s: float = START_TIMEOUT_S) -> None:
        end = time.monotonic() + timeout_s
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if httpx.get(self.url + "/health", timeout=2, trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.2)
        raise AssertionError(f"the server did not come up:\n{self.log.read_text(errors='replace')[-4000:]}")

    def complete(self, ids: list[int], max_tokens: int = NUM_TOKENS) -> list[int]:
        body = {
            "model": "policy",
            "prompt": ids,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        response = httpx.post(self.url + "/v1/completions", json=body, timeout=60, trust_env=False)
        assert response.status_code == 200, response.text
        return list(response.json()["choices"][0]["token_ids"])

    def answers(self) -> list[list[int]]:
        return [self.complete(ids) for ids in PROMPTS]

    def end(self) -> None:
        for number, patience_s in ((signal.SIGTERM, 8.0), (signal.SIGKILL, 5.0)):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(patience_s)
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue


@contextmanager
def vllm_server(model: Path, backend: str, *options: str, **env: str) -> Iterator[Server]:
    """``vllm serve`` of the model; with the native backend nothing of weightcast can be imported there."""
    port = free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--served-model-name", "policy",
        "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "256", "--max-num-seqs", "4",
        "--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", str(64 << 20), "--no-enable-log-requests",
        "--weight-transfer-config", f'{{"backend": "{backend}"}}', *options,
    ]  # fmt: skip
    variables = {"NCCL_HOSTID": f"vllm-{port}", "NCCL_SOCKET_IFNAME": "lo", **env}
    if backend == "weightcast":
        variables |= {"VLLM_PLUGINS": "weightcast", "WEIGHTCAST_TOKEN": secrets.token_hex(8)}
    else:
        paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        others = [path for path in paths if path and not (Path(path) / "weightcast").is_dir()]
        variables |= {"VLLM_PLUGINS": "", "VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": os.pathsep.join(others)}
    server = Server(command, variables, model.parent / f"vllm-{port}.log", port)
    server.token = variables.get("WEIGHTCAST_TOKEN", "")  # type: ignore[attr-defined]
    try:
        server.wait()
        yield server
    finally:
        server.end()


@contextmanager
def embedded_server(model: Path, weight_transfer: str) -> Iterator[Server]:
    """``weightcast serve`` of the model on the GPU."""
    port = free_port()
    command = [
        sys.executable, "-m", "weightcast.cli", "serve", str(model), "--port", str(port), "--device", "cuda",
        "--served-model-name", "policy", "--weight-transfer-config", weight_transfer, "--num-threads", "1",
    ]  # fmt: skip
    variables = {"NCCL_HOSTID": f"embedded-{port}", "NCCL_SOCKET_IFNAME": "lo"}
    server = Server(command, variables, model.parent / f"embedded-{port}.log", port)
    try:
        server.wait()
        yield server
    finally:
        server.end()
