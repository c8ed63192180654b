"""A live table of a run in the terminal: one row per step with reward, served version, publish time by phase, tokens/s."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from weightcast.report.colours import phase_colour
from weightcast.report.model import Report


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of a run as the table shows it. ``matched``: every digest of the round was the published one."""

    number: int
    reward: float
    mean_reward: float
    report: Report
    matched: bool
    tokens_s: float


class LiveTable:
    """Shows the latest ``rows`` steps in place; where output is not a terminal, prints one line per step instead.

    A context manager; ``print`` writes above the table.
    """

    def __init__(self, console: Console, *, rows: int = 14) -> None:
        self.console = console
        self._steps: deque[Step] = deque(maxlen=rows)
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> LiveTable:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def add(self, step: Step) -> None:
        """Show one more step."""
        self._steps.append(step)
        if self._live is None:
            self.console.print(step_line(step), soft_wrap=True, highlight=False, markup=False)
        else:
            self._live.update(self._table(), refresh=True)

    def _table(self) -> RenderableType:
        table = Table(expand=False, pad_edge=False, box=None, header_style="bold")
        table.add_column("step", justify="right")
        table.add_column("reward", justify="right")
        table.add_column("mean of 10")
        table.add_column("served version")
        table.add_column("publish", justify="right")
        table.add_column("by phase")
        table.add_column("tokens/s", justify="right")
        for step in self._steps:
            mark = ("✓ ", "green") if step.matched else ("✗ ", "bold red")
            table.add_row(
                str(step.number),
                f"{step.reward:.3f}",
                reward_bar(step.mean_reward),
                Text.assemble(mark, step.report.version),
                f"{step.report.total_s * 1e3:.1f} ms",
                phase_bar(step.report),
                f"{step.tokens_s:,.0f}",
            )
        return Group(table, legend(self._steps[-1].report) if self._steps else Text())


def reward_bar(reward: float, width: int = 12) -> Text:
    """A bar from 0 to 1 with its number."""
    filled = round(max(0.0, min(1.0, reward)) * width)
    return Text.assemble(("█" * filled, "green"), ("░" * (width - filled), "dim"), f" {reward:.3f}")


def phase_bar(report: Report, width: int = 24) -> Text:
    """The phases of a round side by side, as long as their share of the time."""
    seconds = report.phase_seconds()
    total = sum(seconds.values())
    bar = Text()
    drawn, passed = 0, 0.0
    for name, value in seconds.items():
        passed += value
        end = round(passed / total * width) if total else 0
        bar.append("▄" * (end - drawn), phase_colour(name))
        drawn = end
    return bar


def legend(report: Report) -> Text:
    """Names and milliseconds of a round's phases, in the colours of its bar."""
    text = Text.assemble(("publish: ", "dim"))
    for name, seconds in report.phase_seconds().items():
        text.append("▄ ", phase_colour(name))
        text.append(f"{name} {seconds * 1e3:.1f} ms   ")
    return text


def step_line(step: Step) -> str:
    """One step as one line of plain text."""
    phases = " ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in step.report.phase_seconds().items())
    return (
        f"step {step.number:3d}  reward {step.reward:.3f} (mean {step.mean_reward:.3f})  "
        f"serves {step.report.version} digest {'ok' if step.matched else 'MISMATCH'}  "
        f"publish {step.report.total_s * 1e3:.1f} ms [{phases}]  {step.tokens_s:,.0f} tokens/s"
    )
