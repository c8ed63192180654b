"""What a publisher leaves behind of its rounds: metrics, a log of reports, structured lines."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from weightcast import Publisher
from weightcast.errors import InvalidInput, PeerLost, RoundFailed
from weightcast.logs import JsonFormatter, about, log_as_json
from weightcast.report.roundlog import read_rounds
from weightcast.testing.local_engine import DictModel, LocalEngine


def values() -> dict[str, torch.Tensor]:
    return {"w": torch.randn(16, 8), "b": torch.randn(8)}


@pytest.fixture
def engines() -> Iterator[list[LocalEngine]]:
    made = [LocalEngine(name, [DictModel(values())], mode="staged") for name in ("a", "b")]
    yield made
    for engine in made:
        engine.stop()


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Value by name and label values, in the order of the labels' names."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def fail_once(engine: LocalEngine, trainer: Publisher) -> None:
    def before(phase: str) -> None:
        if phase == "commit":
            raise PeerLost("gone for a moment")

    engine.before = before
    with pytest.raises(RoundFailed):
        trainer.publish()
    engine.before = lambda phase: None


def test_metrics_count_rounds_phases_bytes_and_members(engines: list[LocalEngine]) -> None:
    weights = values()
    nbytes = sum(value.nbytes for value in weights.values())
    with Publisher(weights, engines, timeout_s=20, transport="shm", metrics_port=0) as trainer:
        assert samples(trainer.metrics.render().decode())["weightcast_members", "absent"] == 2
        trainer.publish()
        fail_once(engines[1], trainer)
        report = trainer.publish()
        page = httpx.get(f"http://127.0.0.1:{trainer.metrics_port}/metrics", timeout=5)
        found = samples(page.text)
        assert found["weightcast_rounds_total", "committed"] == 2
        assert found["weightcast_rounds_total", "aborted"] == 1
        assert found["weightcast_round_seconds_count", "committed"] == 2
        for phase in ("gather", "begin", "transfer", "verify", "commit"):
            assert found["weightcast_phase_seconds_count", phase] == 3
        assert found["weightcast_phase_seconds_count", "undo"] == 1
        assert found["weightcast_transferred_bytes_total", "a", "shm"] == 3 * nbytes
        assert found["weightcast_engine_failures_total", "b"] == 1
        assert found["weightcast_members", "ready"] == 2
        assert found["weightcast_member_version_info", "a", report.version] == 1
        engines[0].before = engines[1].before = _unreachable
        for engine in engines:
            engine.stop()
        with pytest.raises(RoundFailed, match="not connected"):
            trainer.publish(timeout_s=2.0)
        found = samples(trainer.metrics.render().decode())
        assert found["weightcast_rounds_total", "unconnected"] == 1
        assert found["weightcast_members", "absent"] == 2
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{trainer.metrics_port}/metrics", timeout=5)


def _unreachable(phase: str) -> None:
    raise PeerLost("nobody listens")


def test_a_taken_port_is_named(engines: list[LocalEngine]) -> None:
    with Publisher(values(), engines, metrics_port=0) as first, pytest.raises(InvalidInput, match="metrics") as caught:
        Publisher(values(), engines, metrics_port=first.metrics_port)
    assert caught.value.field == "metrics_port"


def test_the_log_has_every_round(engines: list[LocalEngine], tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    with Publisher(values(), engines, timeout_s=20, log=path) as trainer:
        first = trainer.publish()
        fail_once(engines[1], trainer)
        last = trainer.publish()
        assert trainer.last_report == last
    reports = list(read_rounds(path))
    assert [report.outcome for report in reports] == ["committed", "aborted", "committed"]
    assert reports[0] == first
    assert reports[2] == last
    failed = {engine.name: engine for engine in reports[1].engines}
    assert "gone for a moment" in str(failed["b"].error)
    assert failed["a"].version == first.version
    assert not reports[1].digests_match


def test_numbers_go_on_from_the_log_when_no_engine_knows_them(engines: list[LocalEngine], tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    with Publisher(values(), engines[:1], timeout_s=20, log=path) as trainer:
        for _ in range(3):
            trainer.publish()
    with path.open("ab") as file:
        file.write(b'{"version": "9-torn')
    with Publisher(values(), engines[1:], timeout_s=20, log=path) as trainer:
        assert trainer.publish().number == 4
    assert [report.number for report in read_rounds(path)] == [1, 2, 3, 4]
    with Publisher(values(), engines[1:], timeout_s=20, log=tmp_path / "another.jsonl") as trainer:
        assert trainer.publish().number == 5


def test_lines_say_which_round_they_are_about(engines: list[LocalEngine]) -> None:
    stream = io.StringIO()
    handler = log_as_json(stream=stream)
    try:
        with Publisher(values(), engines, timeout_s=20) as trainer:
            report = trainer.publish()
            fail_once(engines[1], trainer)
    finally:
        handler.close()
    assert not logging.getLogger("weightcast").handlers
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    done = next(line for line in lines if line.get("version") == report.version)
    assert (done["epoch"], done["round"], done["level"]) == (report.epoch, report.round, "info")
    failed = next(line for line in lines if line["level"] == "warning" and line.get("engine") == "b")
    assert (failed["round"], failed["phase"]) == (2, "commit")
    live = [line for line in lines if line["logger"] == "weightcast.receiver.receiver"]
    assert [(line["round"], line["version"]) for line in live if line["round"] == 1] == [(1, report.version)] * 2
    for line in live:
        assert re.fullmatch(
            r"version \S+ is live: [1-9]\d* bytes by \w+ in \d+\.\d{3} s, applied in .* s \(\w+\)", line["message"]
        )
    assert not [line for line in lines if line["level"] != "info" and line.get("round") == 1]


def test_lines_as_json_are_written_once(engines: list[LocalEngine]) -> None:
    """Whatever handlers the application has; the root logger stays as it is, and after ``close()`` all is as before."""
    root, logger = logging.getLogger(), logging.getLogger("weightcast")
    others, lines = io.StringIO(), io.StringIO()
    application = logging.StreamHandler(others)
    root.addHandler(application)
    before = (list(root.handlers), root.level, logger.level, logger.propagate)
    try:
        handler = log_as_json(stream=lines)
        with Publisher(values(), engines, timeout_s=20) as trainer:
            trainer.publish()
        assert " is live: " in lines.getvalue()
        assert others.getvalue() == ""
        handler.close()
        handler.close()
        assert (list(root.handlers), root.level, logger.level, logger.propagate) == before
        logger.warning("as ever")
        assert others.getvalue() == "as ever\n"
    finally:
        root.removeHandler(application)


def test_a_line_is_one_json_object_whatever_it_says() -> None:
    try:
        raise ValueError("a\nb")
    except ValueError:
        record = logging.LogRecord("n", logging.ERROR, "f", 1, 'x "y"\n%s', ("ü",), sys.exc_info())
    record.__dict__.update(about(round=3, worker=0))
    text = JsonFormatter().format(record)
    assert "\n" not in text
    line = json.loads(text)
    assert line["message"] == 'x "y"\nü'
    assert (line["round"], line["worker"]) == (3, 0)
    assert "ValueError: a\nb" in line["traceback"]
