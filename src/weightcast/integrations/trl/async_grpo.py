"""WeightTransfer: what TRL's AsyncGRPOTrainer is given as ``weight_transfer=`` to publish with weightcast."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from weightcast.integrations.given_streams import GivenStreams
from weightcast.report.model import Report


class WeightTransfer:
    """TRL's ``WeightTransferProtocol`` over a Publisher. TRL calls the methods on its main process.

    Args:
        engines: what a Publisher takes.
        token: the token that the servers demand.
        options: more arguments of ``integrations.given_streams.GivenStreams``, such as ``wait_s``, and of Publisher.
    """

    def __init__(self, engines: Sequence[Any], *, token: str | None = None, **options: Any) -> None:
        self._streams = GivenStreams(engines, token=token, **options)
        self.last_report: Report | None = None

    def init_weight_transfer(self) -> None:
        """Nothing yet: the first round connects."""

    def pause(self) -> None:
        """Nothing: engines go on until the commit, which holds requests in flight by itself."""

    def send_weights(self, iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Publish one round; raises RoundFailed where an engine does not serve it."""
        self.last_report = self._streams.publish(iterator)

    def resume(self) -> None:
        """Nothing: the commit let requests go on."""

    def destroy(self) -> None:
        """Leave the engines, which go on with what they serve."""
        self._streams.close()
