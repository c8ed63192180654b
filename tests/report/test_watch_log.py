"""What ``weightcast watch`` reads of a publisher's log: the latest rounds, whatever stands between them."""

from __future__ import annotations

from pathlib import Path

import pytest

from weightcast.cli.watch import WatchServer
from weightcast.report.model import Report
from weightcast.report.roundlog import TAIL_NBYTES, RoundLog, latest_rounds


def report_of(number: int) -> Report:
    return Report(
        version=f"{number}-0123456789ab", number=number, epoch=1, round=number, digest="0" * 16, mode="staged",
        nbytes=1, total_s=0.1, outcome="committed",
    )  # fmt: skip


@pytest.mark.parametrize("torn", [b'{"version": "9-torn', b"\xff\xfe\n", b"null\n", b"\n\n"])
def test_a_line_that_is_no_report_is_passed_over(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "rounds.jsonl"
    log = RoundLog(path)
    log.append(report_of(1))
    log.append(report_of(2))
    with path.open("ab") as file:
        file.write(torn)
    with WatchServer([], log=path) as server:
        (trainer,) = server.rounds()["engines"]
    assert [entry["version"] for entry in trainer["rounds"]] == [report_of(1).version, report_of(2).version]
    assert trainer["status"]["weight_version"] == report_of(2).version
    assert log.last_number() == 2


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    line = report_of(1).to_json().encode() + b"\n"
    path.write_bytes(line * (2 * TAIL_NBYTES // len(line)))
    RoundLog(path).append(report_of(2))
    reports = latest_rounds(path)
    assert reports[-1] == report_of(2)
    assert TAIL_NBYTES // len(line) - 1 <= len(reports) <= TAIL_NBYTES // len(line) + 1


def test_a_log_that_cannot_be_read_has_no_rounds(tmp_path: Path) -> None:
    assert latest_rounds(tmp_path / "none.jsonl") == []
    assert latest_rounds(tmp_path) == []
    with WatchServer([], log=tmp_path / "none.jsonl") as server:
        assert server.rounds() == {"engines": []}
