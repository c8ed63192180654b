"""The report record and its log."""

from __future__ import annotations

import dataclasses
import json
import logging
import random
from pathlib import Path

import pytest
from report_samples import make_report

from weightcast.errors import InvalidInput
from weightcast.report import Phase, Report, RoundLog, format_bytes, read_rounds


def test_json_round_trip_gives_an_equal_report() -> None:
    rng = random.Random(11)
    for num_workers in (0, 1, 3):
        report = make_report(rng, num_workers=num_workers)
        line = report.to_json()
        assert "\n" not in line
        assert Report.from_json(line) == report


@pytest.mark.parametrize("text", ["", "[]", '{"version": 1}', "{", '{"version": "1-a"}'])
def test_what_is_not_a_report_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="not a report"):
        Report.from_json(text)


def test_negative_times_and_unknown_outcomes_are_refused() -> None:
    with pytest.raises(InvalidInput, match="negative"):
        Phase(name="x", start_s=0.0, seconds=-1.0)
    with pytest.raises(InvalidInput, match="negative"):
        Phase(name="x", start_s=float("nan"), seconds=1.0)
    with pytest.raises(InvalidInput, match="outcome"):
        Report(version="", number=0, epoch=0, round=0, digest="", mode="", nbytes=0, total_s=0, outcome="fine")  # type: ignore[arg-type]


def test_a_log_of_former_versions_has_no_time_and_one_of_no_clock_is_refused() -> None:
    report = make_report(random.Random(13))
    told = json.loads(report.to_json())
    assert told.pop("at") == report.at
    assert Report.from_json(json.dumps(told)).at is None
    for at in (-1.0, 1e300, float("inf")):
        with pytest.raises(InvalidInput, match="no time since 1970"):
            dataclasses.replace(report, at=at)


def test_digests_match_only_when_every_engine_has_the_published_one() -> None:
    rng = random.Random(12)
    assert make_report(rng).digests_match
    assert not make_report(rng, matching=False).digests_match
    sharded = make_report(rng, num_workers=2)
    assert not sharded.digests_match, "parts of a sharded engine do not prove the whole by themselves"
    assert not make_report(rng, num_workers=0).digests_match


def test_phases_add_up_in_the_order_they_began() -> None:
    phases = (
        Phase(name="b", start_s=2.0, seconds=0.5),
        Phase(name="a", start_s=1.0, seconds=0.25),
        Phase(name="a", start_s=3.0, seconds=0.5),
    )
    report = Report(
        version="1-a", number=1, epoch=1, round=1, digest="a", mode="staged", nbytes=3 * 10**9, total_s=1.5,
        outcome="committed", phases=phases,
    )  # fmt: skip
    assert list(report.phase_seconds().items()) == [("a", 0.75), ("b", 0.5)]
    assert report.rate_gb_s == 2.0
    assert str(report) == "committed 1-a on 0/0 engines, staged: 3 GB in 1500.0 ms (2.00 GB/s)"


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (2_570_000, "2.57 MB"), (269_060_552, "269 MB"), (10**12, "1 TB")],
)
def test_bytes_for_people(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


def test_log_holds_every_report_in_order(tmp_path: Path) -> None:
    rng = random.Random(13)
    reports = [make_report(rng, number=number) for number in range(5)]
    log = RoundLog(tmp_path / "rounds.jsonl")
    assert all(log.append(report) for report in reports)
    assert list(read_rounds(log.path)) == reports


def test_log_reading_names_the_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    path.write_text(make_report(random.Random(14)).to_json() + "\n{broken\n")
    rounds = read_rounds(path)
    next(rounds)
    with pytest.raises(InvalidInput, match="line 2"):
        next(rounds)


def test_full_disk_fails_no_round_and_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    log = RoundLog("/dev/full")
    report = make_report(random.Random(15))
    with caplog.at_level(logging.WARNING):
        assert not log.append(report)
        assert not log.append(report)
    assert len(caplog.records) == 1
    assert "/dev/full" in caplog.text


def test_log_goes_on_when_its_folder_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "later"
    log = RoundLog(folder / "rounds.jsonl")
    first, second = (make_report(random.Random(seed)) for seed in (16, 17))
    assert not log.append(first)
    folder.mkdir()
    assert log.append(second)
    assert list(read_rounds(log.path)) == [second]


def test_a_line_that_fits_only_in_part_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    log = RoundLog(tmp_path / "rounds.jsonl")
    first, second = (make_report(random.Random(seed)) for seed in (18, 19))
    assert log.append(first)
    whole = os.write
    monkeypatch.setattr(os, "write", lambda file, data: whole(file, data[: len(data) // 2]))
    assert not log.append(second)
    monkeypatch.undo()
    assert log.append(second)
    assert list(read_rounds(log.path)) == [first, second]
