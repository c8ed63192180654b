"""RoundLog: reports appended to a file of JSON lines; a log that cannot be written never fails a round."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from weightcast.errors import InvalidInput
from weightcast.report.model import Report

logger = logging.getLogger(__name__)


class RoundLog:
    """Appends one line per report to ``path``.

    A full disk, a missing right or a vanished folder is logged once as a warning; later reports are still tried, so the
    log goes on when there is room again. A line is written whole: what a failed write left behind is cut off.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._warned = False

    def append(self, report: Report) -> bool:
        """Write one report; False when it could not be written. Raises nothing for the file's sake."""
        line = report.to_json().encode() + b"\n"
        try:
            self._write(line)
        except OSError as error:
            if not self._warned:
                logger.warning("round log %s cannot be written (%s); rounds go on without it", self.path, error)
                self._warned = True
            return False
        self._warned = False
        return True

    def _write(self, line: bytes) -> None:
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            written = os.write(file, line)
            if written < len(line):
                os.ftruncate(file, os.fstat(file).st_size - written)
                raise OSError(f"only {written} of {len(line)} bytes fitted")
        finally:
            os.close(file)


def read_rounds(path: str | Path) -> Iterator[Report]:
    """The reports of a RoundLog's file in order; raises InvalidInput with the line number of one that is not a report."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield Report.from_json(line)
            except InvalidInput as error:
                raise InvalidInput(f"{path}, line {number}: {error.message}", field="report") from None
