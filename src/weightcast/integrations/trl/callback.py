"""PublishCallback: any trainer with transformers' callbacks publishes before its first rollout and after every optimizer step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import TrainerCallback

from weightcast.errors import StateError
from weightcast.report.model import Report
from weightcast.trainer.publisher import Publisher

logger = logging.getLogger(__name__)


class PublishCallback(TrainerCallback):  # type: ignore[misc]
    """Brings engines to the trainer's weights when training begins and after every optimizer step.

    Under several processes every rank makes a Publisher of its own part of the model, and all of them publish together.

    Args:
        engines: what a Publisher takes: URLs, engine objects or EngineClients. Only those of rank 0 count.
        token: the token that the servers demand.
        wait_s: how long servers that are not there yet, or still load their model, are waited for.
        options: more arguments of Publisher.
    """

    def __init__(
        self, engines: Sequence[Any], *, token: str | None = None, wait_s: float = 600.0, **options: Any
    ) -> None:
        self._engines, self._wait_s = engines, wait_s
        self._options = {"token": token, **options}
        self._publisher: Publisher | None = None

    @property
    def publisher(self) -> Publisher:
        """The Publisher of the training that runs."""
        if self._publisher is None:
            raise StateError("the callback has a Publisher while its trainer trains", hint="Call trainer.train()")
        return self._publisher

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        self._close()
        assert model is not None, "a trainer tells its callbacks its model"
        self._publisher = Publisher(model, self._engines, **self._options)
        self._publisher.connect(wait_s=self._wait_s)
        self._publish("before the first step", state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._publish(f"after step {state.global_step}", state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._close()

    def _publish(self, when: str, state: Any) -> Report:
        report = self.publisher.publish()
        if state.is_world_process_zero:
            logger.info("%s: %s", when, report)
        return report

    def _close(self) -> None:
        if self._publisher is not None:
            self._publisher.close()
            self._publisher = None
