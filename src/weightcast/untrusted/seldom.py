"""Seldom: what strangers can cause any number of times is logged once a minute, with how often it happened."""

from __future__ import annotations

import logging
import time

QUIET_S = 60.0


class Seldom:
    """Says each thing at most once a minute. The caller bounds how many different things there are."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._said: dict[str, float] = {}
        self._unsaid: dict[str, int] = {}

    def is_due(self, what: str) -> int:
        """How often it happened since it was last said, this time included; 0 when that is not a minute ago."""
        now = time.monotonic()
        self._unsaid[what] = self._unsaid.get(what, 0) + 1
        if now - self._said.get(what, -QUIET_S) < QUIET_S:
            return 0
        self._said[what] = now
        return self._unsaid.pop(what)

    def warn(self, what: str, *, about: str = "") -> None:
        """``about`` is said of this time alone."""
        count = self.is_due(what)
        if count:
            text = f"{what}: {about}" if about else what
            self._logger.warning("%s (%d since this was last said; said once a minute)", text, count)


class SeldomFilter(logging.Filter):
    """Lets each warning of a logger through once a minute: strangers decide how often uvicorn says that a request was invalid."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__()
        self._seldom = Seldom(logger)

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or self._seldom.is_due(str(record.msg)) > 0
