"""Another user of the host prepares the place where weightcast writes: links are not followed, and logs are for their owner."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from weightcast.report.model import Report
from weightcast.report.page import Page, write_page
from weightcast.report.roundlog import RoundLog
from weightcast.server.run import ready_file
from weightcast.untrusted.written import write_whole


def report_of(number: int) -> Report:
    return Report(
        version=f"{number}-0123456789ab", number=number, epoch=1, round=number, digest="0" * 16, mode="staged",
        nbytes=1, total_s=0.1, outcome="committed",
    )  # fmt: skip


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    file = tmp_path / "precious"
    file.write_text("a key\n")
    return file


def links_around(target: Path, precious: Path) -> None:
    """Every name that was ever guessed for a temporary file, and the target itself."""
    for name in (f"{target.name}.partial", f".{target.name}.{os.getpid()}", f".{target.name}.partial", target.name):
        target.with_name(name).symlink_to(precious)


def test_a_page_follows_no_link(tmp_path: Path, precious: Path) -> None:
    target = tmp_path / "report.html"
    links_around(target, precious)
    assert write_page(target, Page(title="mine", reports=[report_of(1)])) == target
    assert "mine" in target.read_text()
    assert not target.is_symlink()
    assert precious.read_text() == "a key\n"


def test_a_ready_file_follows_no_link(tmp_path: Path, precious: Path) -> None:
    target = tmp_path / "url"
    links_around(target, precious)
    with ready_file(target) as write:
        write("http://127.0.0.1:1")
        assert target.read_text() == "http://127.0.0.1:1\n"
        assert not target.is_symlink()
    assert not target.exists()
    assert precious.read_text() == "a key\n"


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "full").touch()
    with pytest.raises(OSError, match="directory"):
        write_whole(tmp_path / "folder", "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]


def test_a_round_log_is_for_its_owner(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        log = RoundLog(tmp_path / "rounds.jsonl")
        assert log.append(report_of(1))
    finally:
        os.umask(before)
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600


@pytest.mark.parametrize("content", ["a key\n", "a key without an end"])
def test_a_round_log_follows_no_link(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str) -> None:
    precious = tmp_path / "precious"
    precious.write_text(content)
    (tmp_path / "rounds.jsonl").symlink_to(precious)
    assert not RoundLog(tmp_path / "rounds.jsonl").append(report_of(1))
    assert "cannot be written" in caplog.text
    assert precious.read_text() == content
