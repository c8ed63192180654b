"""Records: what is kept of every round, whether it was committed or not: metrics, and a file of reports where one is wanted."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from weightcast.errors import WeightcastError
from weightcast.logs import about
from weightcast.report.model import Report
from weightcast.report.roundlog import RoundLog
from weightcast.trainer.fleet.link import UNKNOWN, EngineLink
from weightcast.trainer.metrics import TrainerMetrics

logger = logging.getLogger(__name__)


class Records:
    """Keeps reports of rounds of these engines (the list may change later)."""

    def __init__(self, engines: list[EngineLink], *, log: str | Path | None = None) -> None:
        self._engines = engines
        self._log = RoundLog(log) if log is not None else None
        self.metrics = TrainerMetrics(self.members, self.versions)
        self.last: Report | None = None
        self.last_number = self._log.last_number() if self._log is not None else 0
        """The highest version number that the log knew at the start."""

    def members(self) -> dict[str, str]:
        """The state of each engine: "ready", "dirty", "unknown" (what it serves could not be asked), or why it is not connected."""
        states = {}
        for engine in list(self._engines):
            gone = engine.lost() if engine.joined else engine.broken
            here = "dirty" if engine.dirty else "unknown" if engine.version == UNKNOWN else "ready"
            states[engine.name] = gone or here
        return states

    def versions(self) -> dict[str, str]:
        """What each engine serves, as last heard."""
        return {engine.name: engine.version for engine in list(self._engines)}

    def keep(self, report: Report) -> None:
        """Take in the report of a round; a log that cannot be written is no fault of the round's."""
        if report.outcome == "committed":
            self.last = report
        where = about(epoch=report.epoch, round=report.round, version=report.version)
        logger.info("%s", report, extra=where)
        self.metrics.count(report)
        if self._log is not None:
            self._log.append(report)

    def keep_unconnected(self, failures: Mapping[str, WeightcastError]) -> None:
        """Take in a publish that found engines missing, and ended."""
        self.metrics.count_unconnected(failures)

    def close(self) -> None:
        """Free the port of the metrics; idempotent."""
        self.metrics.close()
