"""The demo's page: the run's report, with what somebody who trains by reinforcement looks for first."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version

import torch

from weightcast import __version__
from weightcast.report.page import Chart, Page
from weightcast.report.plot import moving_mean
from weightcast.report.rounds import stalls
from weightcast.report.tables import Cell, Table
from weightcast_demo import task
from weightcast_demo.record import Run

SAMPLES = 10
"""Held-out prompts whose answers are shown."""


def page_of(run: Run) -> Page:
    """The page of a run that has come to its end."""
    options = run.options
    return Page(
        title="A policy learns while a live server serves it",
        summary=(
            f"Qwen3 with 0.64M parameters, sorting {options.num_digits} digits: {run.warmth.steps} supervised steps, then "
            f"{len(run.steps)} steps of GRPO with {options.num_prompts} x {options.group_size} samples in "
            f"{run.seconds:.0f} s. Rollouts come from a server process; its weights are published after every step."
        ),
        facts=run.facts(),
        charts=_charts(run),
        tables=[_samples(run)],
        details=[_environment(run)],
        reports=run.reports,
    )


def _charts(run: Run) -> list[Chart]:
    stats = [step.stats for step in run.steps]
    time = {
        "sampling": [step.sampling_s for step in run.steps],
        "training": [step.stats.seconds for step in run.steps],
        "publishing": [step.publishing_s for step in run.steps],
    }
    return [
        Chart(
            title="Reward",
            note="The share of exactly right answers.",
            series={"mean of 10 steps": moving_mean(run.rewards, 10), "each step": run.rewards},
            wide=True,
        ),
        Chart(title="KL to the warmed-up policy", unit="nats", series={"KL": [step.kl for step in stats]}),
        Chart(title="Entropy of a token", unit="nats", series={"entropy": [step.entropy for step in stats]}),
        Chart(title="Gradient norm", series={"gradient norm": [step.grad_norm for step in stats]}),
        Chart(title="Share of time", kind="shares", unit="s", series=time),
        Chart(
            title="Generation",
            unit="tokens/s",
            series={"tokens/s": [step.num_tokens / max(step.sampling_s, 1e-9) for step in run.steps]},
        ),
        Chart(
            title="Stall per commit",
            unit="ms",
            note="From the server's pause to the end of the pause.",
            series=stalls(run.reports),
            x_label="round",
        ),
        Chart(
            title="Publish",
            unit="ms",
            series={"publish": [report.total_s * 1e3 for report in run.reports]},
            x_label="round",
        ),
        Chart(
            title="Largest gap of log-probabilities",
            note="Between the server and the trainer, of one sampled token.",
            series={"gap": [step.logprob_gap for step in stats]},
        ),
        Chart(title="Length of answers", unit="tokens", series={"tokens": [step.answer_length for step in run.steps]}),
    ]


def _samples(run: Run) -> Table:
    rows: list[list[str | Cell]] = []
    for prompt, before, after in list(zip(run.prompts, run.before, run.after, strict=True))[:SAMPLES]:
        right = task.decode(task.answers(torch.tensor([prompt]))[0].tolist())
        rows.append([task.decode(prompt), right, _answer(prompt, before), _answer(prompt, after)])
    return Table(
        title="Sample answers",
        note="Held-out prompts, answered by the server with its likeliest tokens before the first step and after the last.",
        columns=("prompt", "right answer", "before", "after"),
        rows=rows,
    )


def _answer(prompt: Sequence[int], answer: Sequence[int]) -> Cell:
    earned = task.reward(prompt, answer) == 1.0
    return Cell(text=f"{'✓' if earned else '✗'} {task.decode(answer)}", state="good" if earned else "bad")


def _environment(run: Run) -> Table:
    options = run.options
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = {
        "seed": options.seed,
        "steps": f"{len(run.steps)} of GRPO after {run.warmth.steps} supervised ones",
        "a step": f"{options.num_prompts} prompts, {options.group_size} answers to each, one optimizer step",
        "learning rate": f"{options.lr:g}, AdamW, gradients clipped to norm 1",
        "warm-up": f"until a right answer has probability {options.warm_up:g}; {run.warmth.probability:.3f} was reached",
        "weightcast": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "Python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {cores} cores, {torch.get_num_threads()} for the trainer",
    }
    return Table(
        title="Environment and seed",
        columns=("what", "value"),
        rows=[[name, str(value)] for name, value in rows.items()],
    )
