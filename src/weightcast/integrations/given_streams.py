"""Streams that a framework hands over: one iterator a round, which gathers on all ranks and tidies up at its end."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from weightcast.report.model import Report
from weightcast.trainer.publisher import Publisher


def publish_to_its_end(publisher: Publisher, tensors: Iterator[tuple[str, torch.Tensor]]) -> Report:
    """Publish what an iterator yields, and read it to its end even where the round fails: other ranks gather with this one, and
    adapters are un-merged behind the last tensor."""
    try:
        return publisher.publish(pair for pair in tensors)
    finally:
        for _ in tensors:
            continue
