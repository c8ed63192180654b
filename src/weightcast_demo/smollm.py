"""Weights streamed into a running server: SmolLM2 starts with random weights and talks gibberish, then knows the capital of France."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console

from weightcast.errors import DeadlineExceeded, EngineError
from weightcast_demo.server import LAUNCH, ServerProcess
from weightcast_demo.smollm_checkpoint import ensure_checkpoint

QUESTION = "What is the capital of France?"
EXPECTED = "Paris"
MODEL_NAME = "smollm2-135m"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What the same server said to the same question before and after the push."""

    before: str
    after: str

    @property
    def passed(self) -> bool:
        return EXPECTED in self.after and EXPECTED not in self.before


def run_demo(
    console: Console, *, cache: Path, port: int = 0, transport: str = "auto", timeout_s: float = 300.0
) -> Answers:
    """Serve random weights, ask, push the checkpoint, ask again."""
    with console.status("checkpoint (downloaded and converted at the first run)"):
        checkpoint = ensure_checkpoint(cache)
    console.print(f"checkpoint: {checkpoint}", highlight=False, soft_wrap=True)
    arguments = (
        "--served-model-name",
        MODEL_NAME,
        "--load-format",
        "dummy",
        "--max-model-len",
        "512",
        "--device",
        "cpu",
    )
    with ServerProcess(checkpoint, *arguments, port=port, timeout_s=timeout_s) as server:
        with console.status("server starting, with random weights"):
            server.wait_until_listening()
        with server.client() as client:
            before = _ask(client, console, "random weights")
            _push(checkpoint, server, console, transport=transport, timeout_s=timeout_s)
            after = _ask(client, console, "after the push")
    return Answers(before=before, after=after)


def _ask(client: httpx.Client, console: Console, label: str) -> str:
    body = {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0.0,
        "max_tokens": 24,
    }
    with console.status(f"asking: {QUESTION}"):
        reply = client.post("/v1/chat/completions", json=body)
    if reply.status_code != 200:
        raise EngineError(f"/v1/chat/completions answered {reply.status_code}: {reply.text[:400]}")
    answer = str(reply.json()["choices"][0]["message"]["content"])
    console.print(f"{label}: {QUESTION}\n    {answer!r}", highlight=False, markup=False, soft_wrap=True)
    return answer


def _push(checkpoint: Path, server: ServerProcess, console: Console, *, transport: str, timeout_s: float) -> None:
    """``weightcast push`` as a process of its own, as a user would run it beside the server."""
    command = ["push", str(checkpoint), "--to", server.url, "--transport", transport, "--timeout", str(timeout_s)]
    console.print(f"weightcast {' '.join(command)}", highlight=False, markup=False, soft_wrap=True)
    environment = {**os.environ, "WEIGHTCAST_TOKEN": server.token}
    try:
        done = subprocess.run(
            [sys.executable, *LAUNCH, *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s + 60,
        )
    except subprocess.TimeoutExpired:
        raise DeadlineExceeded(f"weightcast push did not end in {timeout_s + 60:g} s") from None
    console.print(done.stdout.rstrip(), highlight=False, markup=False, soft_wrap=True)
    if done.returncode != 0:
        raise EngineError(
            f"weightcast push ended with status {done.returncode}; the server's last lines:\n{server.log_tail()}"
        )
