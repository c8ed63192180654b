"""A page is one file around a JSON document: what the document says, and that no text in it becomes markup."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import random
import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from report_samples import make_report
from typer.testing import CliRunner

from weightcast.cli import app
from weightcast.errors import InvalidInput
from weightcast.report.colours import PHASE_COLOURS, phase_colour
from weightcast.report.page import LIVE_PAGE, Chart, Page, embedded, render, write_page
from weightcast.report.roundlog import RoundLog
from weightcast.report.rounds import KEPT, stalls
from weightcast.report.tables import Cell, Table

HOSTILE = "</script><script>alert('x')</script><!--<script>\"'&<img src=x onerror=y>\u2028\u2029]]>"


class Elements(HTMLParser):
    """The elements of a page, with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    @property
    def tags(self) -> list[str]:
        return [tag for tag, _ in self.found]


def document_in(text: str) -> dict[str, Any]:
    """The document that a browser's JSON.parse gets."""
    (data,) = re.findall(r'<script type="application/json" id="document">(.*?)</script>', text, re.DOTALL)
    found: dict[str, Any] = json.loads(data)
    return found


def test_the_document_has_every_round_and_its_figures() -> None:
    rng = random.Random(21)
    reports = [make_report(rng, number=number + 1) for number in range(7)]
    reports[3] = make_report(rng, number=4, matching=False)
    rewards = [rng.random() for _ in range(6)]
    chart = Chart(title="Reward", series={"mean": rewards, "each": rewards[::-1]})
    document = document_in(
        render(Page(title="a run", reports=reports, charts=[chart], facts={"Accuracy": "0.5 → 0.9"}))
    )
    (trainer,) = document["engines"]
    for told, report in zip(trainer["rounds"], reports, strict=True):
        assert (told["version"], told["digest"], told["proven"]) == (
            report.version,
            report.digest,
            report.digests_match,
        )
        assert told["phases"] == [
            {"name": phase.name, "start_s": phase.start_s, "seconds": phase.seconds} for phase in report.phases
        ]
        assert told["error"] is None
    assert document["charts"][0]["series"] == {"mean": rewards, "each": rewards[::-1]}
    assert document["facts"]["Accuracy"] == "0.5 → 0.9"
    assert document["facts"]["Rounds proven by digest"] == {"text": "6 of 7", "state": "bad"}
    assert document["details"][0]["rows"][0][0] == reports[-1].engines[0].name


def test_failed_rounds_say_why_and_long_runs_are_cut() -> None:
    rng = random.Random(22)
    good, bad = make_report(rng, number=1), make_report(rng, number=2)
    engine = dataclasses.replace(bad.engines[0], ok=False, error="PeerLost: the worker was killed")
    bad = dataclasses.replace(bad, outcome="aborted", engines=(engine,))
    (trainer,) = Page(title="t", reports=[good] * KEPT + [bad]).document()["engines"]
    assert len(trainer["rounds"]) == KEPT
    assert f"newest {KEPT} of {KEPT + 1}" in trainer["note"]
    assert trainer["rounds"][-1].error == f"aborted; {engine.name}: PeerLost: the worker was killed"
    assert trainer["status"]["weight_version"] == good.version
    degraded = dataclasses.replace(good, engines=(engine,))
    (trainer,) = Page(title="t", reports=[degraded]).document()["engines"]
    assert "the worker was killed" in trainer["rounds"][0].error


def test_the_command_makes_a_page_of_a_log(tmp_path: Path) -> None:
    rng = random.Random(26)
    reports = [make_report(rng, number=number) for number in (1, 2, 3)]
    log = RoundLog(tmp_path / "rounds.jsonl")
    assert all(log.append(report) for report in reports)
    made = CliRunner().invoke(app, ["report", str(log.path), "--out", str(tmp_path / "page.html")])
    assert made.exit_code == 0, made.output
    document = document_in((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert [told["version"] for told in document["engines"][0]["rounds"]] == [report.version for report in reports]
    assert [told["at"] for told in document["engines"][0]["rounds"]] == [report.at for report in reports]
    assert document["charts"][0]["series"]["publish"] == [report.total_s * 1e3 for report in reports]
    (tmp_path / "empty").touch()
    (tmp_path / "broken").write_text("{")
    for name, message in (("none", "cannot be read"), ("empty", "holds no rounds"), ("broken", "line 1")):
        refused = CliRunner().invoke(app, ["report", str(tmp_path / name), "--out", str(tmp_path / "other.html")])
        assert refused.exit_code == 1
        assert message in refused.output.replace("\n", " ")
        assert not (tmp_path / "other.html").exists()


def test_stalls_are_from_the_pause_to_its_end() -> None:
    rng = random.Random(23)
    first, second = make_report(rng), make_report(rng)
    other = dataclasses.replace(second.engines[0], name="other", phases=())
    second = dataclasses.replace(second, engines=(*second.engines, other))
    found = stalls([first, second])
    name = first.engines[0].name
    assert found[name] == pytest.approx([first.total_s * 1e3, second.total_s * 1e3])
    assert [value != value for value in found["other"]] == [True, True]
    charts = [Chart(title="s", series=found), Chart(title="nothing", series={"other": found["other"]})]
    (drawn,) = document_in(render(Page(title="t", charts=charts)))["charts"]
    assert drawn["series"]["other"] == [None, None]


def hostile_page() -> Page:
    report = make_report(random.Random(23))
    engine = report.engines[0]
    worker = dataclasses.replace(engine.workers[0], transport=HOSTILE, reason=HOSTILE, digest=HOSTILE)
    engine = dataclasses.replace(
        engine, name=HOSTILE, kind=HOSTILE, version=HOSTILE, ok=False, error=HOSTILE, workers=(worker,)
    )
    phase = dataclasses.replace(report.phases[0], name=HOSTILE)
    report = dataclasses.replace(
        report, version=HOSTILE, digest=HOSTILE, mode=HOSTILE, engines=(engine,), phases=(phase,), unused=(HOSTILE,)
    )
    return Page(
        title=HOSTILE,
        summary=HOSTILE,
        reports=[report],
        facts={HOSTILE: HOSTILE},
        charts=[Chart(title=HOSTILE, note=HOSTILE, unit=HOSTILE, series={HOSTILE: [1.0], "__proto__": [2.0]})],
        tables=[Table(title=HOSTILE, columns=(HOSTILE,), rows=[[HOSTILE], [Cell(text=HOSTILE, state="bad")]])],
    )


def test_nothing_from_outside_becomes_markup() -> None:
    text = render(hostile_page())
    found = Elements(text)
    assert found.tags.count("script") == 2
    assert "img" not in found.tags
    assert not any(name.startswith("on") for _, attributes in found.found for name in attributes)
    document = document_in(text)
    assert document["title"] == HOSTILE, "the text itself arrives as it is"
    assert document["tables"][0]["rows"][1][0] == {"text": HOSTILE, "state": "bad"}


def test_no_sign_of_markup_is_left_in_embedded_json() -> None:
    rng = random.Random(24)
    signs = "<>&\u2028\u2029/!-[]{}\"'\\\n\x00\ud7ff\U0001f600 script"
    for _ in range(200):
        text = "".join(rng.choice(signs) for _ in range(rng.randrange(40)))
        made = embedded({text: [text, float("nan")]})
        assert not set(made) & set("<>&\u2028\u2029")
        assert json.loads(made) == {text: [text, None]}


def test_the_page_loads_nothing_and_admits_its_own_script_alone() -> None:
    for page, connect in ((Page(title="t", reports=[make_report(random.Random(25))]), "'none'"), (LIVE_PAGE, "'self'")):
        text = render(page)
        found = Elements(text)
        assert not [attributes for _, attributes in found.found if "src" in attributes]
        assert [attributes.get("href") for tag, attributes in found.found if tag == "link"] == ["data:,"]
        (policy,) = [attributes["content"] for tag, attributes in found.found if "http-equiv" in attributes]
        rules = dict(rule.split(" ", 1) for rule in (policy or "").split("; "))
        for kind, tag in (("style-src", "style"), ("script-src", "script")):
            (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
            assert rules[kind] == f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
        assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
        assert rules["connect-src"] == connect


def test_the_script_puts_texts_in_as_texts() -> None:
    for name in ("charts.js", "page.js"):
        script = files("weightcast.report").joinpath("assets", name).read_text(encoding="utf-8")
        for way in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "Function(", "srcdoc"):
            assert way not in script


def test_no_phase_is_red_and_a_name_has_one_colour() -> None:
    for name in (*PHASE_COLOURS, "some other", "another", "x"):
        red, green, blue = (int(phase_colour(name)[place : place + 2], 16) for place in (1, 3, 5))
        assert red < 1.5 * max(green, blue), name
        assert phase_colour(name) == phase_colour(name)
    assert len({phase_colour(name) for name in ("gather", "begin", "transfer", "verify", "commit", "undo")}) == 6
    assert len({phase_colour(name) for name in ("pause", "apply", "resume")}) == 3


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InvalidInput, match="different lengths"):
        Chart(title="t", series={"a": [1.0], "b": [1.0, 2.0]})
    with pytest.raises(InvalidInput, match="needs 2 cells"):
        Table(title="t", columns=("a", "b"), rows=[["1"]])


def test_writing_replaces_the_page_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    page = Page(title=f"run {random.random()}")
    assert write_page(path, page) == path
    assert path.read_text(encoding="utf-8") == render(page)
    assert list(tmp_path.iterdir()) == [path]
