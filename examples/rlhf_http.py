"""A served process learns what a trainer publishes: rollouts and weights both go over HTTP routes.

    python examples/rlhf_http.py [--engine embedded|vllm|sglang] [--steps 8]

The server is what you would start by hand:

    WEIGHTCAST_TOKEN=... weightcast serve MODEL
    WEIGHTCAST_TOKEN=... vllm serve MODEL --weight-transfer-config '{"backend": "weightcast"}'
    WEIGHTCAST_TOKEN=... sglang serve MODEL
"""

from __future__ import annotations

import argparse
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from policy import NUM_TOKENS, PROMPTS, Learner, build

from weightcast import Publisher, WeightcastError
from weightcast.testing.ports import free_port

COMMANDS = {
    "embedded": ["weightcast", "serve", "--device", "cpu"],
    "vllm": [
        *("vllm", "serve", "--weight-transfer-config", '{"backend": "weightcast"}'),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "64", "--kv-cache-memory-bytes", str(64 << 20)),
    ],
    "sglang": [
        *("sglang", "serve", "--device", "cpu", "--attention-backend", "torch_native", "--disable-cuda-graph"),
        *("--dtype", "float32", "--context-length", "64", "--mem-fraction-static", "0.2", "--max-total-tokens", "4096"),
    ],
}
START_TIMEOUT_S = 240.0


@contextmanager
def serve(engine: str, folder: Path, token: str) -> Iterator[str]:
    """A server of its own process group; its URL."""
    port = free_port()
    program, *arguments = COMMANDS[engine]
    command = [str(Path(sys.executable).parent / program), *arguments, "--port", str(port)]
    command[2:2] = [str(folder), "--host", "127.0.0.1", "--served-model-name", "policy"]
    environment = os.environ | {
        "WEIGHTCAST_TOKEN": token,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "SGLANG_USE_CPU_ENGINE": "1",
    }
    log = folder.parent / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        yield f"http://127.0.0.1:{port}"
    except WeightcastError:
        print(log.read_text(errors="replace")[-4000:], file=sys.stderr)
        raise
    finally:
        server.terminate()
        server.wait(30)


def sample(client: httpx.Client, engine: str) -> list[list[int]]:
    """Sampled answers to all prompts, in one request."""
    if engine == "sglang":
        params = {"max_new_tokens": NUM_TOKENS, "temperature": 1.0, "ignore_eos": True}
        wanted = {"input_ids": PROMPTS, "sampling_params": params}
        return [one["output_ids"] for one in client.post("/generate", json=wanted).raise_for_status().json()]
    body = {
        "model": "policy",
        "prompt": PROMPTS,
        "max_tokens": NUM_TOKENS,
        "temperature": 1.0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    answer = client.post("/v1/completions", json=body).raise_for_status().json()
    return [choice["token_ids"] for choice in sorted(answer["choices"], key=lambda choice: choice["index"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=COMMANDS, default="embedded")
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as scratch:
        folder = build(Path(scratch))
        learner, rewards = Learner(folder), []
        with (
            serve(options.engine, folder, token) as url,
            httpx.Client(base_url=url, timeout=60, trust_env=False) as client,
            Publisher(learner.model, [url], token=token) as publisher,
        ):
            publisher.connect(wait_s=START_TIMEOUT_S)
            for step in range(options.steps):
                report = publisher.publish()
                assert report.digests_match, report
                assert client.get("/weight_info").json()["weight_version"] == report.version
                rewards.append(learner.step(PROMPTS, sample(client, options.engine)))
                print(f"step {step}: reward {rewards[-1]:.2f}; {report}")
    print(f"reward {rewards[0]:.2f} -> {rewards[-1]:.2f}")


if __name__ == "__main__":
    main()
