"""Transports: move the bytes of a plan between a trainer process and a worker process."""

from __future__ import annotations

from weightcast.transports.base import (
    DEFAULT_BUCKET_NBYTES,
    Facts,
    TrainerEnd,
    Transport,
    WorkerEnd,
)
from weightcast.transports.facts import local_facts
from weightcast.transports.registry import TransportRegistry

__all__ = [
    "DEFAULT_BUCKET_NBYTES",
    "Facts",
    "Transport",
    "TrainerEnd",
    "WorkerEnd",
    "TransportRegistry",
    "local_facts",
]
