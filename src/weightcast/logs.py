"""Structured logs: which round, engine, worker and phase a line is about, and a formatter that writes all of it as JSON."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

FIELD = "weightcast"


def about(
    *,
    epoch: int | None = None,
    round: int | None = None,
    engine: str | None = None,
    worker: int | None = None,
    phase: str | None = None,
    version: str | None = None,
) -> dict[str, Any]:
    """``extra=`` for a call of a logger: what the line is about, as far as known."""
    fields = {"epoch": epoch, "round": round, "engine": engine, "worker": worker, "phase": phase, "version": version}
    return {FIELD: {name: value for name, value in fields.items() if value is not None}}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and what ``about`` said of it."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= getattr(record, FIELD, {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class JsonLog(logging.StreamHandler[TextIO]):
    """Weightcast's log as JSON lines; ``close()`` takes it off again, and everything is as it was."""

    def __init__(self, stream: TextIO, level: int) -> None:
        super().__init__(stream)
        self.setFormatter(JsonFormatter())
        self._logger = logging.getLogger("weightcast")
        self._before = (self._logger.level, self._logger.propagate)
        self._logger.addHandler(self)
        self._logger.setLevel(level)
        # An application's own handlers would write each line once more.
        self._logger.propagate = False

    def close(self) -> None:
        """Idempotent."""
        if self in self._logger.handlers:
            self._logger.removeHandler(self)
            level, self._logger.propagate = self._before
            self._logger.setLevel(level)
        super().close()


def log_as_json(level: int = logging.INFO, stream: TextIO | None = None) -> JsonLog:
    """Write weightcast's log as JSON lines to ``stream`` (standard error), and nowhere else."""
    return JsonLog(stream if stream is not None else sys.stderr, level)
