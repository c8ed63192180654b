"""TrainerProcess: a publisher of known values in a process of its own, to be killed and stopped."""

from __future__ import annotations

import time
from typing import Any

from tests.support.engine_process import SLICE_NBYTES, TOKEN, values_of
from tests.support.processes import Child
from weightcast.errors import RoundFailed, WeightcastError
from weightcast.trainer.publisher import Publisher


class TrainerHost:
    """What lives in the process."""

    def __init__(self, urls: list[str], options: dict[str, Any]) -> None:
        self._device = options.pop("device", "cpu")
        self._tensors = values_of(0, self._device)
        self._publisher = Publisher(
            self._tensors, urls, token=TOKEN, **{"bucket_nbytes": SLICE_NBYTES, "timeout_s": 10.0, **options}
        )

    def connect(self) -> None:
        self._publisher.connect()

    def publish(self, seed: int, timeout_s: float | None = None) -> dict[str, Any]:
        """Publish ``values_of(seed)``; what came of it, as plain values."""
        self._tensors.update(values_of(seed, self._device))
        start = time.monotonic()
        answer: dict[str, Any] = {"version": None, "errors": {}, "serving": {}}
        try:
            answer["version"] = self._publisher.publish(timeout_s=timeout_s).version
        except RoundFailed as error:
            answer["errors"] = {name: type(cause).__name__ for name, cause in error.causes.items()}
            answer["serving"] = error.serving
        except WeightcastError as error:
            answer["errors"] = {"publish": type(error).__name__}
        answer["seconds"] = time.monotonic() - start
        return answer

    def versions(self) -> dict[str, str]:
        return self._publisher.versions

    def close(self) -> None:
        self._publisher.close()


class TrainerProcess(Child):
    """A trainer of these engines; ``options`` are Publisher's."""

    def __init__(self, urls: list[str], **options: Any) -> None:
        super().__init__(TrainerHost, urls, options)
