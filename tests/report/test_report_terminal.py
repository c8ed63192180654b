"""The curve and the live table in a terminal, and as lines where there is none."""

from __future__ import annotations

import io
import itertools
import random

import pytest
from report_samples import make_report
from rich.console import Console

from weightcast.report.live import LiveTable, Step
from weightcast.report.plot import curve, moving_mean


def dots(line: str) -> list[int]:
    """Bits of the braille characters of a line."""
    return [ord(character) - 0x2800 for character in line if 0x2800 <= ord(character) < 0x2900]


def test_moving_mean_against_a_direct_sum() -> None:
    rng = random.Random(31)
    values = [rng.random() for _ in range(25)]
    means = moving_mean(values, 10)
    assert means == pytest.approx([sum(values[max(0, i - 9) : i + 1]) / min(10, i + 1) for i in range(25)])


def test_a_rising_line_goes_from_the_lower_left_to_the_upper_right() -> None:
    lines = curve([0.0, 1.0, 2.0, 3.0], width=20, height=5)[:5]
    rows = [dots(line) for line in lines]
    assert all(len(row) == 20 for row in rows)
    filled = [{row for row in range(5) if rows[row][column]} for column in range(20)]
    assert all(filled), "the line has no holes"
    assert filled[0] == {4}
    assert filled[-1] == {0}
    tops = [min(rows_of_column) for rows_of_column in filled]
    assert tops == sorted(tops, reverse=True)


def test_a_steep_line_has_no_holes() -> None:
    rng = random.Random(33)
    lines = curve([rng.random() for _ in range(12)], width=16, height=6)[:6]
    rows = [dots(line) for line in lines]
    columns: list[set[int]] = []
    for column in range(32):
        bits = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))[column % 2]
        columns.append({4 * row + dot for row in range(6) for dot in range(4) if rows[row][column // 2] & bits[dot]})
    for left, right in itertools.pairwise(columns):
        assert left == set(range(min(left), max(left) + 1))
        assert min(abs(a - b) for a in left for b in right) <= 1


@pytest.mark.parametrize("values", [[], [0.25], [0.5, 0.5, 0.5]])
def test_flat_short_and_empty_curves(values: list[float]) -> None:
    lines = curve(values)
    assert lines
    assert any(any(dots(line)) for line in lines) == bool(values)


def test_a_value_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        curve([0.1, float("nan")])


def steps(count: int) -> list[Step]:
    rng = random.Random(32)
    return [
        Step(
            number=number + 1,
            reward=rng.random(),
            mean_reward=rng.random(),
            report=make_report(rng, number=number),
            matched=number != 2,
            tokens_s=rng.uniform(100, 99_999),
        )
        for number in range(count)
    ]


def test_without_a_terminal_each_step_is_one_line() -> None:
    out = io.StringIO()
    taken = steps(5)
    with LiveTable(Console(file=out, force_terminal=False, width=40)) as table:
        for step in taken:
            table.add(step)
    lines = out.getvalue().splitlines()
    assert len(lines) == 5
    for line, step in zip(lines, taken, strict=True):
        assert f"serves {step.report.version} " in line
        assert f"reward {step.reward:.3f}" in line
        assert ("digest ok" in line) == step.matched
        for name, seconds in step.report.phase_seconds().items():
            assert f"{name} {seconds * 1e3:.1f}" in line


def test_in_a_terminal_the_latest_steps_are_shown() -> None:
    out = io.StringIO()
    taken = steps(6)
    with LiveTable(Console(file=out, force_terminal=True, width=160), rows=4) as table:
        for step in taken:
            table.add(step)
    last = out.getvalue().rpartition("served version")[2]
    for step in taken[-4:]:
        assert step.report.version in last
        assert f"{step.tokens_s:,.0f}" in last
    assert taken[1].report.version not in last
    assert last.count("✗") == 1
