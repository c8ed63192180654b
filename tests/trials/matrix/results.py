"""Results of the matrix: records that are kept as JSON, so that columns played on other machines stand in one table."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

from weightcast.untrusted.known import known

State = Literal["passed", "failed", "skipped", "hung"]


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one cell. ``seconds``: of the publish that met the fault; ``played_s``: of the whole cell."""

    fault: str
    transport: str
    mode: str
    state: State
    text: str
    seconds: float | None = None
    played_s: float = 0.0

    @property
    def key(self) -> tuple[str, str, str]:
        return self.fault, self.transport, self.mode

    @property
    def is_broken(self) -> bool:
        """Whether a promise was broken."""
        return self.state in ("failed", "hung")


def read_results(path: Path) -> list[Result]:
    """The results in a file; none when there is no file."""
    if not path.exists():
        return []
    return msgspec.json.decode(path.read_bytes(), type=known(list[Result]))


def write_results(path: Path, results: Iterable[Result]) -> None:
    """One result a line, so that a changed one shows as a changed line."""
    lines = b",\n".join(msgspec.json.encode(result) for result in results)
    path.write_bytes(b"[\n" + lines + b"\n]\n")


def merge(known: Iterable[Result], new: Iterable[Result], order: Iterable[tuple[str, str, str]]) -> list[Result]:
    """New results take the place of known ones, except that a skipped cell does not hide one that was played elsewhere.

    ``order`` lists the keys that exist; results of others are dropped.
    """
    found = {result.key: result for result in known}
    for result in new:
        before = found.get(result.key)
        if result.state != "skipped" or before is None or before.state == "skipped":
            found[result.key] = result
    return [found[key] for key in order if key in found]
