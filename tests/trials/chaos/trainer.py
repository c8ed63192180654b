"""The trainer of a chaos run, in a process of its own."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from typing import Any

import transformers

from tests.support.processes import Child
from weightcast.errors import RoundFailed, WeightcastError
from weightcast.testing.models import random_state_dict
from weightcast.trainer.publisher import Publisher


class TrainerHost:
    """Publishes the weights of seeds."""

    def __init__(self, checkpoint: str, urls: list[str], token: str, options: dict[str, Any]) -> None:
        faulthandler.register(signal.SIGUSR1)
        self._config = transformers.AutoConfig.from_pretrained(checkpoint)
        self._tensors = random_state_dict(self._config, 0)
        self._publisher = Publisher(self._tensors, urls, token=token, **options)

    def ready(self) -> bool:
        """Answers once the process has started and imported everything."""
        return True

    def publish(self, seed: int, timeout_s: float) -> dict[str, Any]:
        """What came of a publish, as plain values."""
        self._tensors.update(random_state_dict(self._config, seed))
        answer: dict[str, Any] = {"version": None, "error": "", "ok": (), "dirty": ()}
        start = time.monotonic()
        try:
            report = self._publisher.publish(timeout_s=timeout_s)
            answer |= {"version": report.version, "ok": tuple(e.name for e in report.engines if e.ok)}
        except WeightcastError as error:
            answer["error"] = str(error)
            if isinstance(error, RoundFailed):
                answer["dirty"] = error.dirty
        return answer | {"seconds": time.monotonic() - start}

    def close(self) -> None:
        self._publisher.close()


class ChaosTrainer(Child):
    """A trainer that can be killed and stopped."""

    def __init__(self, checkpoint: str, urls: list[str], token: str, **options: Any) -> None:
        super().__init__(TrainerHost, checkpoint, urls, token, options)

    def dump_threads(self) -> None:
        """Have it write to standard error where each of its threads is."""
        os.kill(self.pid, signal.SIGUSR1)
