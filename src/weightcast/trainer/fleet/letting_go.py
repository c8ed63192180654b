"""Letting go: what ``hold="round"`` asks of engines after each call, so that a trainer can free its memory. Engines stay joined."""

from __future__ import annotations

import logging

from weightcast.deadline import Deadline
from weightcast.errors import WeightcastError
from weightcast.messages import LetGo, Ready
from weightcast.trainer.fleet.fleet import Fleet
from weightcast.trainer.fleet.link import EngineLink

logger = logging.getLogger(__name__)

REASON = "its pairs are made anew for each round"


def close_pairs(fleet: Fleet, deadline: Deadline) -> None:
    """Have every worker close its pairs, and close this side's. An engine that does not answer joins again before its next round."""
    engines = [engine for engine in fleet.engines if engine.joined]
    fleet.begin_epoch(fleet.engines)
    for engine in engines:
        fleet.coordinator.clear_inboxes(worker.member for worker in engine.workers)
        engine.broken = engine.broken or REASON
        for worker in engine.workers:
            worker.close_end()
            worker.at = (fleet.epoch, 0)
            fleet.coordinator.send(worker.member, LetGo(epoch=fleet.epoch))
    for engine in engines:
        try:
            for worker in engine.workers:
                fleet.coordinator.take(
                    worker.member,
                    Ready,
                    deadline,
                    phase="release",
                    matches=lambda said: getattr(said, "epoch", None) == fleet.epoch,
                )
        except WeightcastError as error:
            _drop(engine, error)


def _drop(engine: EngineLink, error: WeightcastError) -> None:
    engine.joined, engine.broken = False, f"it did not let go of the trainer's memory: {error.message}"
    logger.warning("%s did not let go of the trainer's memory: %s", engine.name, str(error))
