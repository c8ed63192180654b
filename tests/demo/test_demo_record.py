"""The demo judges itself honestly: each way to fail fails it."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import torch

from weightcast.errors import InvalidInput
from weightcast.report.html import write_page
from weightcast.report.model import EngineReport, Report, WorkerReport
from weightcast_demo.grpo import Rollouts, StepStats, Warmth
from weightcast_demo.record import MAX_LOGPROB_GAP, Options, Run


def report(number: int, digest: str) -> Report:
    worker = WorkerReport(rank=0, transport="shm", reason="", nbytes=10, seconds=0.1, digest=digest)
    engine = EngineReport(name="e", kind="http", version=f"{number}-v", ok=True, workers=(worker,))
    return Report(
        version=f"{number}-v", number=number, epoch=1, round=number, digest=digest, mode="staged", nbytes=10, total_s=0.1,
        outcome="committed", engines=(engine,),
    )  # fmt: skip


def rollouts(reward: float) -> Rollouts:
    mask = torch.ones(4, 3, dtype=torch.bool)
    blank = torch.zeros(4, 3)
    return Rollouts(
        prompts=blank, tokens=blank, logprobs=blank, mask=mask, rewards=torch.full((4,), reward), group_size=2, seconds=0.5
    )  # fmt: skip


def run_of(rewards: list[float], *, gap: float = 1e-6) -> Run:
    run = Run(options=Options(), warmth=Warmth(steps=3, probability=0.3), seconds=1.0)
    run.add_round(report(1, "first"), True)
    for number, reward in enumerate(rewards):
        run.add_round(report(number + 2, f"digest {number}"), True)
        stats = StepStats(loss=0.0, grad_norm=1.0, clipped=0.0, logprob_gap=gap if number == 1 else 0.0, seconds=0.25)
        run.add_step(rollouts(reward), stats)
    return run


def rising(count: int) -> list[float]:
    return [0.3 + 0.3 * number / count for number in range(count)]


def failed(run: Run) -> list[str]:
    return [check.text for check in run.verdict().checks if not check.passed]


def test_a_good_long_run_passes_with_the_reward_judged() -> None:
    run = run_of(rising(45))
    assert run.verdict().passed
    assert any("reward rose" in check.text for check in run.verdict().checks)


def test_a_long_run_without_rise_fails() -> None:
    assert "reward" in failed(run_of([0.4] * 45))[0]
    assert "reward" in failed(run_of(rising(45)[::-1]))[0]


def test_a_short_run_is_not_judged_by_its_reward() -> None:
    run = run_of([0.4] * 8)
    assert run.verdict().passed
    assert run.window == 4
    assert not any("reward" in check.text for check in run.verdict().checks)


def test_one_wrong_digest_fails() -> None:
    run = run_of(rising(45))
    run.matched[random.Random(71).randrange(len(run.matched))] = False
    assert failed(run) == ["digests of 45 of 46 rounds match what the server holds"]


def test_weights_that_did_not_change_fail() -> None:
    run = run_of([0.4] * 8)
    same = run.reports[2].digest
    run.reports[3] = dataclasses.replace(run.reports[3], digest=same)
    assert failed(run) == ["the served weights changed after 7 of 8 steps that had a gradient"]


def test_a_step_without_gradient_need_not_change_the_weights() -> None:
    run = run_of([0.4] * 8)
    run.reports[3] = dataclasses.replace(run.reports[3], digest=run.reports[2].digest)
    run.grad_norms[2] = 0.0
    assert run.verdict().passed
    run.grad_norms = [0.0] * 8
    assert failed(run) == ["the served weights changed after 0 of 0 steps that had a gradient"]


def test_a_logprob_gap_fails() -> None:
    assert "log-probabilities" in failed(run_of([0.4] * 8, gap=MAX_LOGPROB_GAP * 1.5))[0]


def test_totals_and_page(tmp_path: Path) -> None:
    run = run_of(rising(12))
    assert run.num_tokens == 12 * 12
    assert run.sampling_s == pytest.approx(6.0)
    facts = run.facts()
    assert facts["Generation"] == "24 tokens/s"
    text = write_page(tmp_path / "report.html", run.page()).read_text(encoding="utf-8")
    assert "3 supervised steps" in text
    assert all(value in text for value in facts.values())


@pytest.mark.parametrize("wrong", [{"iterations": 0}, {"group_size": 0}, {"seconds": 0.0}, {"seconds": float("nan")}])
def test_options_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(wrong))):
        Options(**wrong)  # type: ignore[arg-type]
