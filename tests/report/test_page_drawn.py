"""What a browser makes of a page: readable at every width, the same colours everywhere, red for failure alone, and hostile text as text."""

from __future__ import annotations

import colorsys
import dataclasses
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_samples import make_report

from weightcast.report.colours import PHASE_COLOURS
from weightcast.report.model import Phase, Report
from weightcast.report.page import LIVE_PAGE, Chart, Page, render, write_page
from weightcast.report.tables import Cell, Table

sync_api = pytest.importorskip("playwright.sync_api")
SITE = "http://page.test/"
HOSTILE = "</script><script>window.hurt = 1</script><img src=x onerror='window.hurt = 2'>\"'&\u2028"
OVERFLOWING = """() => [document.documentElement, ...document.querySelectorAll('.scroll')]
    .filter((box) => box.scrollWidth > box.clientWidth).map((box) => box.getAttribute('aria-label') || 'the page')"""
TRAINER_PHASES = ("gather", "transfer", "verify", "commit")
ENGINE_PHASES = ("pause", "apply", "resume")
Show = Callable[[Page], None]


def sample_reports(count: int, seed: int) -> list[Report]:
    """Rounds of which the fifth failed; phases are the trainer's."""
    rng = random.Random(seed)
    reports = []
    for number in range(1, count + 1):
        report = make_report(rng, number=number)
        named = zip(report.phases, TRAINER_PHASES, strict=True)
        report = dataclasses.replace(
            report, phases=tuple(dataclasses.replace(phase, name=name) for phase, name in named)
        )
        if number == 5:
            error = "PeerLost: the worker was killed in the middle of a transfer, which is told at some length. " * 4
            engine = dataclasses.replace(report.engines[0], ok=False, error=error)
            report = dataclasses.replace(report, outcome="aborted", engines=(engine,))
        reports.append(report)
    return reports


def sample_page(seed: int) -> Page:
    rng = random.Random(seed)
    values = [rng.uniform(1e4, 1e6) for _ in range(24)]
    gaps = [float("nan") if number % 3 else 1.0 for number in range(24)]
    samples = [["^1234=" * 9, Cell(text="✗ " * 90, state="bad")]]
    return Page(
        title="A run",
        summary="What there was to see. " * 10,
        facts={f"Fact {number}": f"{rng.random():.6f}" for number in range(5)},
        reports=sample_reports(40, seed),
        charts=[
            Chart(title="Wide", series={"mean": values, "each": values[::-1]}, wide=True),
            Chart(title="Small", series={"value": values}, unit="tokens/s"),
            Chart(title="Shares", kind="shares", series={"sampling": values, "training": values[::-1]}, unit="s"),
            Chart(title="Gaps", series={"value": gaps}),
        ],
        tables=[Table(title="Samples", columns=("prompt", "answer"), rows=samples)],
    )


@pytest.fixture
def show(page: sync_api.Page, tmp_path: Path) -> Show:
    """Opens a page from a file, as somebody does who was sent it."""

    def open_file(shown: Page) -> None:
        page.goto(write_page(tmp_path / "page.html", shown).as_uri())

    return open_file


class Site:
    """A server's page and its rounds, answered without a server."""

    def __init__(self, page: sync_api.Page) -> None:
        self.engines: list[dict[str, Any]] = []
        page.route(f"{SITE}**", self._answer)

    def _answer(self, route: sync_api.Route) -> None:
        if route.request.url == SITE:
            route.fulfill(body=render(LIVE_PAGE), content_type="text/html; charset=utf-8")
        else:
            assert route.request.url == f"{SITE}weightcast/rounds"
            route.fulfill(body=json.dumps({"engines": self.engines}), content_type="application/json")


@pytest.fixture
def site(page: sync_api.Page) -> Site:
    return Site(page)


def told_phases(names: tuple[str, ...]) -> list[dict[str, Any]]:
    return [{"name": name, "start_s": 0.002 * place, "seconds": 0.002} for place, name in enumerate(names)]


def live_engine(name: str, times: list[float], **more: Any) -> dict[str, Any]:
    """An engine that committed a version at each of ``times``."""
    rounds = [
        {"at": at, "action": "commit", "epoch": 1, "round": number, "version": f"{number}-ab", "seconds": 0.006, "error": None,
         "phases": told_phases(ENGINE_PHASES)}
        for number, at in enumerate(times, start=1)
    ]  # fmt: skip
    status = {"weight_version": f"{len(times)}-ab", "ready": True, "reason": "", "dirty": False, "paused": False}
    return {"name": name, "status": status, "rounds": rounds, **more}


def colour_of(page: sync_api.Page, selector: str) -> str:
    found: str = page.locator(selector).first.evaluate("(element) => getComputedStyle(element).color")
    return found


def is_red(colour: str) -> bool:
    red, green, blue = (int(part) / 255 for part in re.findall(r"\d+", colour)[:3])
    hue, _, saturation = colorsys.rgb_to_hls(red, green, blue)
    return saturation > 0.3 and (hue < 0.06 or hue > 0.94)


@pytest.mark.parametrize("width", [1280, 1600])
def test_nothing_is_cut_off(width: int, page: sync_api.Page, show: Show) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    show(sample_page(1))
    assert page.evaluate(OVERFLOWING) == []
    assert page.evaluate(
        """() => [...document.querySelectorAll('section *, .tiles *')].filter((element) => {
            const box = element.getBoundingClientRect();
            return box.width && (box.right > innerWidth + 1 || box.left < -1);
        }).length"""
    ) == 0  # fmt: skip


def test_a_phone_scrolls_charts_and_has_two_tiles_abreast(page: sync_api.Page, show: Show) -> None:
    page.set_viewport_size({"width": 390, "height": 800})
    show(sample_page(2))
    overflowing = page.evaluate(OVERFLOWING)
    assert "Wide" in overflowing
    assert "the page" not in overflowing
    tops = page.evaluate("() => [...document.querySelectorAll('.tiles div')].map((tile) => tile.offsetTop)")
    assert all(tops.count(top) == 2 for top in tops[:-1])
    sizes = page.evaluate(
        """() => [...document.querySelectorAll('svg[role=img]')].filter((chart) => chart.getClientRects().length).map((chart) =>
            [chart.getBoundingClientRect().width / chart.viewBox.baseVal.width,
             ...[...chart.querySelectorAll('text')].map((text) => parseFloat(getComputedStyle(text).fontSize))])"""
    )
    assert len(sizes) > 40
    for scale, *letters in sizes:
        assert scale == pytest.approx(1, abs=0.01), "letters are not scaled with their chart"
        assert all(size >= 12 for size in letters)


def test_the_newest_round_is_first_and_failures_alone_are_red(page: sync_api.Page, show: Show) -> None:
    shown = sample_page(3)
    show(shown)
    versions = page.locator("td.round-version").all_text_contents()
    assert versions == [report.version for report in reversed(shown.reports)]
    assert (page.locator("tr.why").text_content() or "").count("the worker was killed") == 4
    assert is_red(colour_of(page, "tr.why td"))
    assert is_red(colour_of(page, "tr.failed td.round-version"))
    assert not is_red(colour_of(page, "tr:not(.failed) td.round-version"))
    painted = set(
        page.evaluate(
            """() => [...document.querySelectorAll('rect, path.line')].flatMap((shape) =>
                [getComputedStyle(shape).fill, getComputedStyle(shape).stroke]).filter((colour) => colour.startsWith('rgb'))"""
        )
    )
    assert len(painted) > 5
    assert [colour for colour in painted if is_red(colour)] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phase_has_one_colour_on_every_page(scheme: Any, page: sync_api.Page, show: Show, site: Site) -> None:
    page.emulate_media(color_scheme=scheme)
    seen: dict[str, set[str]] = {}

    def look() -> None:
        bars = page.locator("rect.phase, .legend rect[data-phase]").evaluate_all(
            "(bars) => bars.map((bar) => [bar.dataset.phase, bar.getAttribute('fill')])"
        )
        for name, colour in bars:
            seen.setdefault(name, set()).add(colour)

    report = sample_reports(1, 4)[0]
    strange = Phase(name="strange", start_s=0.0, seconds=0.001)
    show(Page(title="t", reports=[dataclasses.replace(report, phases=(*report.phases, strange))]))
    look()
    publish = {"at": None, "action": "publish", "epoch": 1, "round": 1, "version": "1", "seconds": 0.01, "error": None,
               "phases": told_phases(("strange", "commit", "transfer", "begin", "gather"))}  # fmt: skip
    site.engines = [
        {"name": "trainer", "role": "trainer", "status": None, "rounds": [publish]},
        live_engine("e", [1000.0, 1010.0]),
    ]
    page.goto(SITE)
    page.locator("rect.phase[data-phase='resume']").first.wait_for()
    look()
    assert set(seen) == {*TRAINER_PHASES, *ENGINE_PHASES, "begin", "strange"}
    assert all(len(colours) == 1 for colours in seen.values())
    assert all(seen[name] == {PHASE_COLOURS[name]} for name in seen if name != "strange")
    versions = page.locator("rect.version").evaluate_all("(boxes) => boxes.map((box) => getComputedStyle(box).fill)")
    assert len(versions) == 2
    assert not any(is_red(colour) for colour in versions)


def test_idle_time_is_left_out_of_the_axis(page: sync_api.Page, site: Site) -> None:
    now = page.evaluate("Date.now() / 1000")
    busy = [now - 90_000 + 10 * number for number in range(6)] + [now - 40 + 10 * number for number in range(4)]
    site.engines = [
        live_engine("first", busy),
        live_engine("second", [at + 0.1 for at in busy]),
        {"name": "gone", "status": None, "rounds": [], "error": "cannot be reached: refused"},
    ]
    page.goto(SITE)
    page.locator("rect.version").first.wait_for()
    boxes = page.locator("rect.version").evaluate_all(
        "(boxes) => boxes.map((box) => [box.dataset.version, box.width.baseVal.value])"
    )
    assert len(boxes) == 20
    total = sum(width for _, width in boxes) / 2
    assert all(width > total / 25 for _, width in boxes), "ten seconds stay visible beside a day"
    assert all(width < total / 2 for _, width in boxes)
    texts = " ".join(page.locator("#lanes .tick").all_text_contents())
    assert "25 h idle" in texts
    assert "now" in texts
    assert "cannot be reached: refused" in (page.locator("#lanes .bad").text_content() or "")
    assert page.locator("[data-engine=gone] .error").text_content() == "cannot be reached: refused"
    assert is_red(colour_of(page, ".tiles dd:text-is('2 of 3')"))
    page.set_viewport_size({"width": 390, "height": 800})
    lanes = page.get_by_role("region", name="Versions over time", exact=True)
    page.wait_for_function("document.querySelector('#lanes .scroll').clientWidth < 400")
    for place in (0, 10_000):
        lanes.evaluate("(box, place) => { box.scrollLeft = place; }", place)
        name = page.locator(".lane-name").first.bounding_box()
        assert name is not None
        assert 0 < name["x"] < 50, "names of engines stay in sight"


def assert_unhurt(page: sync_api.Page) -> None:
    assert page.evaluate("window.hurt") is None
    assert page.locator("script").count() == 2
    assert page.locator("img").count() == 0


def test_hostile_text_in_a_document_is_text(page: sync_api.Page, show: Show) -> None:
    report = sample_reports(5, 6)[-1]
    engine = dataclasses.replace(report.engines[0], name=HOSTILE, kind=HOSTILE, version=HOSTILE, error=HOSTILE)
    phases = tuple(Phase(name=name, start_s=0, seconds=1) for name in ("__proto__", "constructor", HOSTILE))
    report = dataclasses.replace(
        report, version=HOSTILE, digest=HOSTILE, mode=HOSTILE, engines=(engine,), phases=phases
    )
    series = {HOSTILE: [1.0, 2.0], "__proto__": [2.0, 1.0]}
    show(
        Page(
            title=HOSTILE,
            summary=HOSTILE,
            facts={HOSTILE: HOSTILE, "__proto__": HOSTILE},
            reports=[report],
            charts=[Chart(title=HOSTILE, note=HOSTILE, unit=HOSTILE, series=series)],
            tables=[Table(title=HOSTILE, columns=(HOSTILE,), rows=[[HOSTILE]])],
        )
    )
    for box in page.locator("details").all():
        box.evaluate("(box) => { box.open = true; }")
    page.locator("rect.phase").last.hover()
    assert HOSTILE in (page.locator("#tip").text_content() or "")
    assert page.locator("h1").text_content() == HOSTILE
    assert_unhurt(page)


def test_hostile_text_in_an_answer_is_text(page: sync_api.Page, site: Site) -> None:
    hostile = live_engine(HOSTILE, [1000.0, 1010.0], error=HOSTILE, note=HOSTILE)
    for told in hostile["rounds"]:
        told |= {"version": HOSTILE, "action": HOSTILE, "phases": told_phases((HOSTILE, "__proto__"))}
    hostile["rounds"].append({**hostile["rounds"][0], "error": HOSTILE})
    hostile["status"] |= {"weight_version": HOSTILE, "ready": False, "reason": HOSTILE}
    hostile["status"] |= {"adapters": {HOSTILE: {"weight_version": HOSTILE}}}
    site.engines = [hostile, live_engine("trainer", [])]
    page.goto(SITE)
    page.locator("rect.version").first.wait_for()
    page.locator("rect.version").first.hover()
    assert HOSTILE in (page.locator("#tip").text_content() or "")
    assert page.locator(".engine h3").first.text_content() == f"{HOSTILE * 4}@{HOSTILE}"
    assert page.locator(".tiles:has-text('2 of 2')").count() == 1, (
        "an engine that calls itself the trainer is an engine"
    )
    assert_unhurt(page)


def test_keys_read_charts_out_and_figures_stand_beside_them(page: sync_api.Page, show: Show) -> None:
    shown = sample_page(7)
    show(shown)
    values = [f"{round(value):,}" for value in shown.charts[1].series["value"]]
    page.locator("svg.chart").nth(1).focus()
    tip = page.locator("#tip")
    for key, step in (("ArrowRight", 1), ("ArrowRight", 2), ("End", 24), ("ArrowLeft", 23), ("Home", 1)):
        page.keyboard.press(key)
        assert tip.text_content() == f"step {step}\nvalue: {values[step - 1]} tokens/s"
    ring = page.locator("svg.chart").nth(1).evaluate("(chart) => getComputedStyle(chart).outlineStyle")
    assert ring == "solid", "what has the focus is seen to have it"
    page.keyboard.press("Tab")
    assert not tip.is_visible()
    figures = page.locator("section:has(h2:text('Small')) details")
    figures.locator("summary").focus()
    page.keyboard.press("Enter")
    rows = figures.locator("tbody tr")
    rows.nth(23).wait_for()
    assert rows.nth(3).locator("td").all_text_contents() == ["4", values[3]]
    assert page.locator("svg[role=img]:not([aria-label])").count() == 0
    assert page.locator(".scroll:not([tabindex='0'])").count() == 0


def test_what_is_drawn_anew_stays_where_it_was(page: sync_api.Page, site: Site) -> None:
    page.set_viewport_size({"width": 390, "height": 800})
    site.engines = [live_engine("e", [1000.0 + 10 * number for number in range(30)])]
    page.goto(SITE)
    page.locator("td.round-version:text-is('30-ab')").wait_for()
    page.locator("details summary").focus()
    page.keyboard.press("Enter")
    rounds = page.get_by_role("region", name="Rounds of e", exact=True)
    rounds.evaluate("(box) => { box.scrollLeft = 40; box.scrollTop = 50; }")
    site.engines = [live_engine("e", [1000.0 + 10 * number for number in range(31)])]
    page.locator("td.round-version:text-is('31-ab')").wait_for()
    assert rounds.evaluate("(box) => [box.scrollLeft, box.scrollTop]") == [40, 50]
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
    page.locator("details td:text-is('31-ab')").wait_for()


def test_ticks_cover_the_range_with_round_numbers(page: sync_api.Page, show: Show) -> None:
    show(Page(title="t"))
    rng = random.Random(25)
    ranges = []
    for _ in range(100):
        low = rng.uniform(-5, 5) * 10 ** rng.randrange(-4, 4)
        ranges.append([low, low + rng.uniform(1e-6, 9) * 10 ** rng.randrange(-3, 4)])
    found = page.evaluate("(ranges) => ranges.map(([low, high]) => ticks(low, high, 5))", ranges)
    for (low, high), marks in zip(ranges, found, strict=True):
        assert marks[0] <= low + 1e-6 * (high - low)
        assert marks[-1] >= high - 1e-6 * (high - low)
        assert 2 <= len(marks) <= 8
    for low in (0, 3, -3, 1e-9):
        flat = page.evaluate("(low) => ticks(low, low, 5)", low)
        assert len(flat) >= 2
        assert flat[0] <= low < flat[-1]
