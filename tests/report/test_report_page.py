"""The page is one well-formed file that says what happened and trusts no text."""

from __future__ import annotations

import dataclasses
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_samples import make_report

from weightcast.errors import InvalidInput
from weightcast.report.html import Page, render, write_page
from weightcast.report.model import Phase
from weightcast.report.svg import ticks

VOID = {"meta", "line", "rect", "polyline", "br"}
HOSTILE = "</script><script>alert('x')</script>\"'&<img src=x onerror=y>"


class Outline(HTMLParser):
    """Checks that tags nest, and keeps what a test asks about."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str, css_class: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag and css_class in (a.get("class") or "").split()]


def outline(text: str) -> Outline:
    parser = Outline()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


def test_every_round_phase_and_digest_is_on_the_page() -> None:
    rng = random.Random(21)
    reports = [make_report(rng, number=number + 1) for number in range(7)]
    rewards = [rng.random() for _ in range(6)]
    page = Page(
        title="a run", reports=reports, series={"mean": rewards, "each": rewards}, facts={"Accuracy": "0.5 → 0.9"}
    )
    found = outline(render(page))
    assert len(found.all("rect", "phase")) == sum(len(report.phases) for report in reports)
    assert len(found.all("rect", "hit")) == len(rewards)
    assert len(found.all("polyline", "line")) == 2
    text = " ".join(found.text)
    for report in reports:
        assert report.version in text
        assert report.digest[:16] in text
    assert "0.5 → 0.9" in text
    assert "7 of 7" in text


def test_a_round_with_a_wrong_digest_is_marked() -> None:
    rng = random.Random(22)
    reports = [make_report(rng), make_report(rng, matching=False)]
    found = outline(render(Page(title="t", reports=reports)))
    assert len(found.all("b", "ok")) == 1
    assert len(found.all("b", "bad")) == 1
    assert "1 of 2" in " ".join(found.text)


def test_nothing_from_outside_becomes_markup() -> None:
    report = make_report(random.Random(23))
    engine = report.engines[0]
    worker = dataclasses.replace(engine.workers[0], transport=HOSTILE, reason=HOSTILE, digest=HOSTILE)
    engine = dataclasses.replace(
        engine, name=HOSTILE, kind=HOSTILE, version=HOSTILE, ok=False, error=HOSTILE, workers=(worker,)
    )
    report = dataclasses.replace(
        report, version=HOSTILE, digest=HOSTILE, mode=HOSTILE, engines=(engine,),
        phases=(Phase(name=HOSTILE, start_s=0.0, seconds=1.0),),
    )  # fmt: skip
    page = Page(
        title=HOSTILE, summary=HOSTILE, reports=[report], series_title=HOSTILE, series={HOSTILE: [1.0], "b": [2.0]},
        facts={HOSTILE: HOSTILE},
    )  # fmt: skip
    found = outline(render(page))
    names = [tag for tag, _ in found.tags]
    assert names.count("script") == 1
    assert "img" not in names
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert any(HOSTILE in text for text in found.text), "the text itself is shown as it is"


def test_the_page_loads_nothing() -> None:
    text = render(Page(title="t", reports=[make_report(random.Random(24))], series={"a": [0.1, 0.2]}))
    assert not re.search(r"(src|href)\s*=|https?://(?!127\.0\.0\.1)|@import|url\(", text)
    assert "default-src 'none'" in text


def test_an_empty_run_gives_a_page_too() -> None:
    outline(render(Page(title="nothing yet", series={"reward": []})))


def test_series_of_different_lengths_are_refused() -> None:
    with pytest.raises(InvalidInput, match="different lengths"):
        Page(title="t", series={"a": [1.0], "b": [1.0, 2.0]})


def test_writing_replaces_the_page_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    page = Page(title=f"run {random.random()}")
    assert write_page(path, page) == path
    assert path.read_text(encoding="utf-8") == render(page)
    assert list(tmp_path.iterdir()) == [path]


def test_ticks_cover_the_range_with_round_numbers() -> None:
    rng = random.Random(25)
    for _ in range(200):
        low = rng.uniform(-5, 5) * 10 ** rng.randrange(-4, 4)
        high = low + rng.uniform(1e-6, 9) * 10 ** rng.randrange(-3, 4)
        marks = ticks(low, high)
        assert marks[0] <= low + 1e-6 * (high - low)
        assert marks[-1] >= high - 1e-6 * (high - low)
        assert 2 <= len(marks) <= 8
