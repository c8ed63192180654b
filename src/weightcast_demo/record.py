"""What the demo was asked to do, what it did, and whether that is what it should have done. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from weightcast.errors import InvalidInput
from weightcast.report.html import Page
from weightcast.report.model import Report
from weightcast.report.plot import moving_mean
from weightcast_demo.grpo import Rollouts, StepStats, Warmth

MIN_RISE = 0.12
"""How much the mean reward of the last ten steps has to exceed that of the first ten."""

MIN_STEPS_FOR_RISE = 40
"""Shorter runs are not judged by their reward."""

MAX_LOGPROB_GAP = 1e-3
"""Server and trainer compute the same float32 model in batches of different shapes: they differ by rounding only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to run the demo. ``warm_up``: the probability of a right answer at which the warm-up ends."""

    iterations: int = 56
    seconds: float | None = None
    """Stop learning after about this long; None: no limit."""
    seed: int = 0
    port: int = 0
    """0: a free one."""
    report: Path | None = Path("report.html")
    num_prompts: int = 32
    group_size: int = 16
    lr: float = 1e-4
    warm_up: float = 0.3
    warm_up_steps: int = 80
    held_out: int = 256
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("iterations", "num_prompts", "group_size", "held_out"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} must be at least 1, not {getattr(self, name)}", field=name)
        if self.seconds is not None and not self.seconds > 0:
            raise InvalidInput(f"seconds must be positive, not {self.seconds}", field="seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that must hold, in words."""

    passed: bool
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """All checks of a run."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


@dataclass(slots=True, kw_only=True)
class Run:
    """What happened so far."""

    options: Options
    warmth: Warmth
    reports: list[Report] = field(default_factory=list)
    matched: list[bool] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    logprob_gap: float = 0.0
    num_tokens: int = 0
    sampling_s: float = 0.0
    training_s: float = 0.0
    seconds: float = 0.0
    accuracy_before: float = 0.0
    accuracy_after: float = 0.0

    def add_round(self, report: Report, matched: bool) -> None:
        self.reports.append(report)
        self.matched.append(matched)

    def add_step(self, rollouts: Rollouts, stats: StepStats) -> None:
        self.rewards.append(rollouts.mean_reward)
        self.grad_norms.append(stats.grad_norm)
        self.logprob_gap = max(self.logprob_gap, stats.logprob_gap)
        self.num_tokens += rollouts.num_tokens
        self.sampling_s += rollouts.seconds
        self.training_s += stats.seconds

    @property
    def window(self) -> int:
        """How many steps at each end are compared: ten, or half of a short run."""
        return max(1, min(10, len(self.rewards) // 2))

    def first_and_last(self) -> tuple[float, float]:
        """Mean reward of the first and of the last steps of the run, ``window`` of them each."""
        count = self.window
        first, last = self.rewards[:count], self.rewards[-count:]
        return sum(first) / len(first), sum(last) / len(last)

    def _learned_and_changed(self) -> tuple[int, int]:
        """Steps with a gradient, and how many of them were followed by a version with another digest.

        Where all answers to every prompt earn the same there is no gradient, and the weights may stay.
        """
        digests = [report.digest for report in self.reports]
        changes = [
            after != before
            for norm, before, after in zip(self.grad_norms, digests[:-1], digests[1:], strict=True)
            if norm > 0
        ]
        return len(changes), sum(changes)

    def verdict(self) -> Verdict:
        """Judge the run; the reward only counts in a run that is long enough to show it."""
        first, last = self.first_and_last()
        learned, changed = self._learned_and_changed()
        checks = [
            Check(
                passed=all(self.matched) and bool(self.matched),
                text=f"digests of {sum(self.matched)} of {len(self.matched)} rounds match what the server holds",
            ),
            Check(
                passed=0 < learned == changed,
                text=f"the served weights changed after {changed} of {learned} steps that had a gradient",
            ),
            Check(
                passed=self.logprob_gap <= MAX_LOGPROB_GAP,
                text=f"served and trainer's log-probabilities differ by at most {self.logprob_gap:.1e} "
                f"(allowed {MAX_LOGPROB_GAP:.0e})",
            ),
        ]
        if len(self.rewards) >= MIN_STEPS_FOR_RISE:
            checks.append(
                Check(
                    passed=last >= first + MIN_RISE,
                    text=f"reward rose from {first:.3f} (first 10 steps) to {last:.3f} (last 10), needed +{MIN_RISE}",
                )
            )
        return Verdict(checks=tuple(checks))

    def facts(self) -> dict[str, str]:
        """The run in figures, for the terminal and the page."""
        first, last = self.first_and_last()
        times = sorted(report.total_s for report in self.reports)
        return {
            f"Reward, first and last {self.window} steps": f"{first:.3f} → {last:.3f}",
            "Greedy accuracy, before and after": f"{self.accuracy_before:.3f} → {self.accuracy_after:.3f}",
            "Largest log-probability gap": f"{self.logprob_gap:.1e}",
            "Generation": f"{self.num_tokens / max(self.sampling_s, 1e-9):,.0f} tokens/s",
            "Time sampling, training, publishing": f"{self.sampling_s:.1f} s, {self.training_s:.1f} s, {sum(times):.1f} s",
        }

    def page(self) -> Page:
        """The report page of the run."""
        options = self.options
        return Page(
            title="A policy learns while a live server serves it",
            summary=(
                f"Qwen3 with 0.64M parameters, sorting eight digits: {self.warmth.steps} supervised steps, then "
                f"{len(self.rewards)} steps of GRPO with {options.num_prompts} x {options.group_size} samples in "
                f"{self.seconds:.0f} s. Rollouts come from a server process; its weights are published after every step."
            ),
            reports=self.reports,
            series_title="Reward (share of exactly right answers)",
            series={"mean of 10 steps": moving_mean(self.rewards, 10), "each step": self.rewards},
            facts=self.facts(),
        )
