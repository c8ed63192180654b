"""Servers of a chaos run: `weightcast serve` processes and the load on them."""

from __future__ import annotations

import logging
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx

from tests.support.engine_process import TOKEN
from tests.support.forked import COMMAND, Forked
from tests.support.ports import HeldPort
from tests.trials.chaos.reference import Answer, Reference

logger = logging.getLogger(__name__)

NAME = "policy"
MAX_TOKENS = 24
LOAD_THREADS = 2
"""More than one, so that requests meet in a batch; few, because the reference checks each of their tokens."""


class Server:
    """One `weightcast serve`, always at the same URL; it can be killed, stopped and started again."""

    def __init__(self, checkpoint: Path, folder: Path, number: int, mode: str) -> None:
        self._checkpoint, self._folder, self._mode = checkpoint, folder, mode
        self._held = HeldPort()
        self.port = self._held.number
        self.url = f"http://127.0.0.1:{self.port}"
        self.name = f"server {number}"
        self._ready = folder / f"ready-{number}"
        self._log = folder / f"server-{number}.log"
        self._process: Forked | None = None
        self.is_stopped = False

    def start(self) -> None:
        """Start it; it serves some seconds later."""
        self._ready.unlink(missing_ok=True)
        arguments = ["serve", self._checkpoint, "--port", self.port, "--token", TOKEN, "--dtype", "float64"]
        arguments += ["--num-threads", 1, "--served-model-name", NAME, "--device", "cpu", "--wait-for-weights"]
        arguments += ["--weight-transfer-config", f'{{"mode": "{self._mode}"}}', "--ready-file", self._ready]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
        self._process = Forked(COMMAND, *arguments, environment=environment, log=self._log)

    @property
    def is_up(self) -> bool:
        return self._process is not None and self._process.poll() is None and self._ready.exists()

    @property
    def is_dead(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def close(self) -> None:
        """Kill it and let go of its port; idempotent."""
        self.kill()
        self._held.close()

    def kill(self) -> None:
        """End it; ``start`` brings it back at the same URL."""
        if self._process is not None:
            self._process.close()
        self._ready.unlink(missing_ok=True)
        self.is_stopped = False

    def stop(self) -> None:
        self._signal(signal.SIGSTOP)
        self.is_stopped = True

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)
        self.is_stopped = False

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def checksums(self) -> tuple[str, dict[str, str]]:
        """The live version, and the digest of each tensor as it lies in the server's memory."""
        answer = httpx.get(
            f"{self.url}/weightcast/status?checksums=true", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=20
        ).json()
        return str(answer["weight_version"]), dict(answer["details"]["checksums"])

    def tail(self) -> str:
        """The end of its log."""
        return self._log.read_text(errors="replace")[-4000:] if self._log.exists() else ""


def ask(server: Server, client: httpx.Client, dice: random.Random) -> tuple[Answer | None, str | None]:
    """A greedy answer to random tokens, None where the server does not answer now; and what it should not have said, if it did."""
    prompt = tuple(dice.randrange(3, 200) for _ in range(dice.randint(1, 12)))
    body: dict[str, Any] = {"model": NAME, "prompt": list(prompt), "max_tokens": MAX_TOKENS, "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True}
    try:
        reply = client.post(f"{server.url}/v1/completions", json=body)
    except httpx.TransportError:
        return None, None
    if reply.status_code != 200:
        wrong = reply.status_code in (404, 422) or (reply.status_code >= 500 and reply.status_code != 503)
        return None, f"{server.name} answered {reply.status_code}: {reply.text[:300]}" if wrong else None
    choice = reply.json()["choices"][0]
    if not choice["token_ids"]:
        return None, None
    spans = tuple((span["version"], span["start"], span["end"]) for span in choice["weight_versions"])
    return Answer(server.name, prompt, tuple(choice["token_ids"]), spans), None


class Load:
    """Asks servers for answers without a pause, on several threads, and has each one checked against the reference."""

    def __init__(self, servers: list[Server], reference: Reference, seed: int) -> None:
        self._servers, self._reference, self._seed = servers, reference, seed
        self._over, self._counting = threading.Event(), threading.Lock()
        self._threads: list[threading.Thread] = []
        self.num_answers = self.num_tokens = self.num_mixed = self.num_refused = 0
        self.faults: list[str] = []

    def start(self) -> None:
        """Begin; ``close`` ends it."""
        for number in range(LOAD_THREADS):
            thread = threading.Thread(target=self._run, args=(number,), name=f"load-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _run(self, number: int) -> None:
        """The broad except is on purpose: a load that ended by itself would check nothing, and nobody would know."""
        try:
            self._go_on_asking(random.Random(f"{self._seed} {number}"))
        except Exception as error:
            logger.exception("the load ended")
            self.faults.append(f"the load ended: {type(error).__name__}: {error}")

    def _go_on_asking(self, dice: random.Random) -> None:
        with new_client() as client:
            while not self._over.is_set():
                answer, fault = ask(dice.choice(self._servers), client, dice)
                if fault is not None:
                    self.faults.append(fault)
                if answer is not None:
                    self.check(answer)
                    continue
                with self._counting:
                    self.num_refused += 1
                time.sleep(0.1)  # a server that starts needs the cores more

    def check(self, answer: Answer) -> None:
        """Compare an answer with the weights of its versions, and count it."""
        fault = self._reference.fault(answer)
        with self._counting:
            if fault is not None:
                self.faults.append(f"{answer.server}: {fault}: {answer}")
            self.num_answers += 1
            self.num_tokens += len(answer.tokens)
            self.num_mixed += len(answer.spans) > 1

    def close(self) -> None:
        """End the load; the requests in flight are waited for."""
        self._over.set()
        for thread in self._threads:
            thread.join(15)


def new_client() -> httpx.Client:
    """Every request gets a connection of its own: a kept one may be closed by a server that dies."""
    return httpx.Client(timeout=8, limits=httpx.Limits(max_keepalive_connections=0))
