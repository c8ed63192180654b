"""The demo judges itself honestly: each way to fail fails it."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from weightcast.errors import InvalidInput
from weightcast.report.model import EngineReport, Phase, Report, WorkerReport
from weightcast.report.page import render
from weightcast_demo import task
from weightcast_demo.grpo import Rollouts, StepStats, Warmth
from weightcast_demo.page import page_of
from weightcast_demo.record import MAX_LOGPROB_GAP, Options, Run, Step


def report(number: int, digest: str) -> Report:
    worker = WorkerReport(rank=0, transport="shm", reason="", nbytes=10, seconds=0.1, digest=digest)
    stall = Phase(name="pause", start_s=0.05, seconds=number * 1e-3)
    engine = EngineReport(name="e", kind="http", version=f"{number}-v", ok=True, workers=(worker,), phases=(stall,))
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


PROMPTS = task.SortingDigits(72).prompts(20)


def answers(num_right: int) -> list[list[int]]:
    """Answers to PROMPTS of which the first ones are right."""
    right = task.answers(PROMPTS).tolist()
    return [answer if row < num_right else answer[::-1] for row, answer in enumerate(right)]


def run_of(rewards: list[float], *, gap: float = 1e-6, before: int = 5, after: int = 11) -> Run:
    run = Run(
        options=Options(), warmth=Warmth(steps=3, probability=0.3), seconds=1.0,
        prompts=PROMPTS.tolist(), before=answers(before), after=answers(after),
    )  # fmt: skip
    run.add_round(report(1, "first"), True)
    for number, reward in enumerate(rewards):
        run.add_round(report(number + 2, f"digest {number}"), True)
        stats = StepStats(
            loss=0.0, grad_norm=1.0 + number, clipped=0.0, logprob_gap=gap if number == 1 else 0.0, kl=number * 1e-3,
            entropy=1 / (number + 1), seconds=0.25,
        )  # fmt: skip
        run.add_step(rollouts(reward), stats, run.reports[-1])
    return run


def without_gradient(step: Step) -> Step:
    return dataclasses.replace(step, stats=dataclasses.replace(step.stats, grad_norm=0.0))


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


def test_a_long_run_whose_answers_got_no_better_fails() -> None:
    for before, after in ((11, 11), (12, 9)):
        (text,) = failed(run_of(rising(45), before=before, after=after))
        assert f"{before / 20:.3f} right before, {after / 20:.3f} after" in text


def test_a_short_run_is_not_judged_by_its_reward() -> None:
    run = run_of([0.4] * 8)
    assert run.verdict().passed
    assert run.window == 2
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
    run.steps[2] = without_gradient(run.steps[2])
    assert run.verdict().passed
    run.steps = [without_gradient(step) for step in run.steps]
    assert failed(run) == ["the served weights changed after 0 of 0 steps that had a gradient"]


def test_a_logprob_gap_fails() -> None:
    assert "log-probabilities" in failed(run_of([0.4] * 8, gap=MAX_LOGPROB_GAP * 1.5))[0]


def test_totals_and_page() -> None:
    run = run_of(rising(12))
    assert run.accuracy == (0.25, 0.55)
    facts = run.facts()
    assert facts["Generation"] == "24 tokens/s"
    assert facts["Time sampling, training, publishing"] == "6.0 s, 3.0 s, 1.2 s"
    page = page_of(run)
    render(page)
    document = page.document()
    assert facts.items() <= document["facts"].items()
    charts = {chart.title: chart.series for chart in document["charts"]}
    assert charts["KL to the warmed-up policy"] == {"KL": [number * 1e-3 for number in range(12)]}
    assert charts["Entropy of a token"] == {"entropy": [1 / (number + 1) for number in range(12)]}
    assert charts["Gradient norm"] == {"gradient norm": [1.0 + number for number in range(12)]}
    assert charts["Share of time"] == {"sampling": [0.5] * 12, "training": [0.25] * 12, "publishing": [0.1] * 12}
    assert charts["Generation"] == {"tokens/s": [24.0] * 12}
    assert charts["Stall per commit"]["e"] == pytest.approx([number + 1.0 for number in range(13)])
    assert charts["Length of answers"] == {"tokens": [3.0] * 12}
    (samples,) = document["tables"]
    states = [[cell.state for cell in row[2:]] for row in samples.rows]
    assert states == [["good", "good"]] * 5 + [["bad", "good"]] * 5
    assert samples.rows[0][1] == task.decode(task.answers(PROMPTS[:1])[0].tolist())
    environment = dict(document["details"][-1].rows)
    assert environment["seed"] == "0"
    assert environment["torch"] == torch.__version__


@pytest.mark.parametrize("wrong", [{"iterations": 0}, {"group_size": 0}, {"seconds": 0.0}, {"seconds": float("nan")}])
def test_options_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(wrong))):
        Options(**wrong)  # type: ignore[arg-type]
