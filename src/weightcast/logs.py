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


def log_as_json(level: int = logging.INFO, stream: TextIO | None = None) -> logging.Handler:
    """Write weightcast's log as JSON lines to ``stream`` (standard error); returns the handler, to take it off again."""
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("weightcast")
    logger.addHandler(handler)
    logger.setLevel(level)
    return handler
