"""RoundLog: reports appended to a file of JSON lines; a log that cannot be written never fails a round."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from weightcast.errors import InvalidInput
from weightcast.report.model import Report

logger = logging.getLogger(__name__)

TAIL_NBYTES = 2**20
_SAFELY = os.O_CLOEXEC | os.O_NOFOLLOW
"""A link that somebody put at the log's path is not followed: other files would be written to."""


class RoundLog:
    """Appends one line for each report to the file ``path``, which only its owner may read.

    A full disk, a missing right, a link in the log's place or a vanished folder is told once as a warning. Later reports are still tried,
    so the log goes on when there is room again. A line is written whole: the rest of a line that a failed write, or a process that
    died, left behind is cut off.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._warned = False
        self._mended = False

    def append(self, report: Report) -> bool:
        """Write one report and return True, or False when the file could not be written. A file that cannot be written raises nothing."""
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

    def last_number(self) -> int:
        """Return the highest version number of the latest reports, or 0 when there are none. Lines that are no reports are skipped."""
        return max((report.number for report in latest_rounds(self.path)), default=0)

    def _mend(self) -> None:
        """Cut off the line that a process left unfinished when it died."""
        with os.fdopen(os.open(self.path, os.O_RDWR | _SAFELY), "rb+") as file:
            size = os.fstat(file.fileno()).st_size
            start = max(0, size - TAIL_NBYTES)
            file.seek(start)
            tail = file.read(size - start)
            if tail and not tail.endswith(b"\n"):
                file.truncate(start + tail.rfind(b"\n") + 1)

    def _write(self, line: bytes) -> None:
        if not self._mended and self.path.is_file():
            self._mend()
        self._mended = True
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | _SAFELY, 0o600)
        try:
            written = os.write(file, line)
            if written < len(line):
                os.ftruncate(file, os.fstat(file).st_size - written)
                raise OSError(f"only {written} of {len(line)} bytes fitted")
        finally:
            os.close(file)


def latest_rounds(path: str | Path) -> list[Report]:
    """The reports in the last ``TAIL_NBYTES`` of a RoundLog's file. Lines that are no reports are passed over: the first may be
    cut off, the last be still in writing. None where the file cannot be read."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size  # 0 for what is no file and has no end
            file.seek(max(0, size - TAIL_NBYTES))
            lines = file.read(min(size, TAIL_NBYTES)).splitlines()
    except OSError:
        return []
    reports = []
    for line in lines:
        with contextlib.suppress(InvalidInput):
            reports.append(Report.from_json(line))
    return reports


def read_rounds(path: str | Path) -> Iterator[Report]:
    """Return the reports of a RoundLog's file in order. InvalidInput names the number of a line that is not a report."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield Report.from_json(line)
            except InvalidInput as error:
                raise InvalidInput(f"{path}, line {number}: {error.message}", field="report") from None
