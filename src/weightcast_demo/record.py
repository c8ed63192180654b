"""What the demo was asked to do, what it did, and whether that is what it should have done. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from weightcast.errors import InvalidInput
from weightcast.report.model import Report
from weightcast_demo import task
from weightcast_demo.grpo import Rollouts, StepStats, Warmth

MAX_LOGPROB_GAP = 1e-3
"""Server and trainer compute the same float32 model in batches of different shapes: they differ by rounding only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to run the demo. ``warm_up``: the probability of a right answer at which the warm-up ends."""

    num_digits: int = task.NUM_DIGITS
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
    min_rise: float = 0.12
    """How much the mean reward of the last steps has to exceed that of the first ones."""
    judged_from: int = 40
    """Runs of fewer steps are not judged by what was learned."""

    def __post_init__(self) -> None:
        for name in ("num_digits", "iterations", "num_prompts", "group_size", "held_out"):
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step: what its rollouts earned, what the optimizer saw, and where the time went."""

    reward: float
    num_tokens: int
    num_answers: int
    sampling_s: float
    publishing_s: float
    stats: StepStats

    @property
    def answer_length(self) -> float:
        """Tokens an answer, on average."""
        return self.num_tokens / self.num_answers


@dataclass(slots=True, kw_only=True)
class Run:
    """What happened so far. ``prompts`` are held out; ``before`` and ``after`` are the served policy's likeliest answers to them."""

    options: Options
    warmth: Warmth
    reports: list[Report] = field(default_factory=list)
    matched: list[bool] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    seconds: float = 0.0
    prompts: Sequence[Sequence[int]] = ()
    before: Sequence[Sequence[int]] = ()
    after: Sequence[Sequence[int]] = ()

    def add_round(self, report: Report, matched: bool) -> None:
        self.reports.append(report)
        self.matched.append(matched)

    def add_step(self, rollouts: Rollouts, stats: StepStats, report: Report) -> None:
        self.steps.append(
            Step(
                reward=rollouts.mean_reward,
                num_tokens=rollouts.num_tokens,
                num_answers=len(rollouts.tokens),
                sampling_s=rollouts.seconds,
                publishing_s=report.total_s,
                stats=stats,
            )
        )

    @property
    def rewards(self) -> list[float]:
        """The mean reward of each step."""
        return [step.reward for step in self.steps]

    @property
    def logprob_gap(self) -> float:
        """The largest gap between the server's and the trainer's log-probability of a token."""
        return max((step.stats.logprob_gap for step in self.steps), default=0.0)

    @property
    def accuracy(self) -> tuple[float, float]:
        """Share of held-out prompts answered rightly, before and after."""
        return task.accuracy(self.prompts, self.before), task.accuracy(self.prompts, self.after)

    @property
    def window(self) -> int:
        """How many steps at each end are compared: ten, or a third of a short run."""
        return max(1, min(10, len(self.steps) // 3))

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
            for step, before, after in zip(self.steps, digests[:-1], digests[1:], strict=True)
            if step.stats.grad_norm > 0
        ]
        return len(changes), sum(changes)

    def verdict(self) -> Verdict:
        """Judge the run; what was learned only counts in a run that is long enough to show it."""
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
        if len(self.steps) >= self.options.judged_from:
            checks += self._judge_learning()
        return Verdict(checks=tuple(checks))

    def _judge_learning(self) -> list[Check]:
        first, last = self.first_and_last()
        before, after = self.accuracy
        needed = self.options.min_rise
        return [
            Check(
                passed=last >= first + needed,
                text=f"reward rose from {first:.3f} (first {self.window} steps) to {last:.3f} (last {self.window}), "
                f"needed +{needed:g}",
            ),
            Check(
                passed=after > before,
                text=f"greedy answers to held-out prompts: {before:.3f} right before, {after:.3f} after, needed more",
            ),
        ]

    def facts(self) -> dict[str, str]:
        """The run in figures, for the terminal and the page."""
        first, last = self.first_and_last()
        before, after = self.accuracy
        sampling = sum(step.sampling_s for step in self.steps)
        training = sum(step.stats.seconds for step in self.steps)
        publishing = sum(step.publishing_s for step in self.steps)
        tokens = sum(step.num_tokens for step in self.steps)
        return {
            f"Reward, first and last {self.window} steps": f"{first:.3f} → {last:.3f}",
            "Greedy accuracy, before and after": f"{before:.3f} → {after:.3f}",
            "Largest log-probability gap": f"{self.logprob_gap:.1e}",
            "Generation": f"{tokens / max(sampling, 1e-9):,.0f} tokens/s",
            "Time sampling, training, publishing": f"{sampling:.1f} s, {training:.1f} s, {publishing:.1f} s",
        }
