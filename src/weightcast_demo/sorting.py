"""The main demo: a policy learns to sort digits by GRPO while a live server serves each version of it.

The trainer is this process. The server is ``weightcast serve`` in a process of its own; it starts without weights, gets them by
``publish()`` after every optimizer step, and gives the rollouts that the next step learns from.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from rich.console import Console

from weightcast.errors import EngineError, InvalidInput
from weightcast.report.live import LiveTable, Step
from weightcast.report.model import Report
from weightcast.report.page import write_page
from weightcast.report.plot import curve, moving_mean
from weightcast_demo import task
from weightcast_demo.grpo import Learner, Warmth
from weightcast_demo.page import page_of
from weightcast_demo.policy import build_policy, save_folder
from weightcast_demo.record import Options, Run, Verdict
from weightcast_demo.sampler import HttpSampler
from weightcast_demo.server import ServerProcess

MODEL_NAME = "sorter"


def run_demo(options: Options, console: Console) -> Verdict:
    """Run the whole demo, print as it goes, write the page; the verdict says whether it did what it should."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="weightcast-demo-") as folder:
        save_folder(Path(folder))
        arguments = (
            "--served-model-name",
            MODEL_NAME,
            "--wait-for-weights",
            "--load-format",
            "dummy",
            "--dtype",
            "float32",
            # Where the learner is: no transport goes from CPU memory to a GPU.
            "--device",
            "cpu",
        )
        with ServerProcess(Path(folder), *arguments, port=options.port) as server:
            console.print(f"server starting on {server.url} (process {server.pid}), it waits for weights")
            learner = Learner(build_policy(options.seed), lr=options.lr)
            warmth = _warm_up(learner, options, console)
            server.wait_until_listening()
            with server.client() as client:
                run = _Training(learner, server, client, options, console).go(warmth)
    return _conclude(run, console)


def _warm_up(learner: Learner, options: Options, console: Console) -> Warmth:
    began = time.perf_counter()
    with console.status("supervised warm-up"):
        warmth = learner.warm_up(
            task.SortingDigits(options.seed, options.num_digits),
            enough=options.warm_up,
            max_steps=options.warm_up_steps,
        )
    console.print(
        f"warm-up: {warmth.steps} supervised steps in {time.perf_counter() - began:.1f} s, "
        f"a right answer has probability {warmth.probability:.2f}",
        highlight=False,
    )
    return warmth


@dataclass(slots=True)
class _Training:
    """The part of the demo in which the server is up."""

    learner: Learner
    server: ServerProcess
    client: httpx.Client
    options: Options
    console: Console

    def go(self, warmth: Warmth) -> Run:
        from weightcast import Publisher

        options = self.options
        run = Run(options=options, warmth=warmth)
        sampler = HttpSampler(self.client, model=MODEL_NAME)
        held_out = task.SortingDigits(options.seed + 2**31, options.num_digits).prompts(options.held_out)
        run.prompts = held_out.tolist()
        with Publisher(
            self.learner.model, engines=[self.server.url], token=self.server.token, timeout_s=options.timeout_s
        ) as publisher:
            publisher.connect()
            run.add_round(*self._publish(publisher))
            self._expect_ready()
            run.before = sampler.greedy(held_out)
            accuracy = task.accuracy(run.prompts, run.before)
            self.console.print(f"first version served: greedy accuracy {accuracy:.2f}", highlight=False)
            self._learn(run, sampler, publisher)
            run.after = sampler.greedy(held_out)
        return run

    def _learn(self, run: Run, sampler: HttpSampler, publisher: Any) -> None:
        options = self.options
        prompts = task.SortingDigits(options.seed + 1, options.num_digits)
        began = time.perf_counter()
        with LiveTable(self.console) as table:
            for number in range(1, options.iterations + 1):
                rollouts = sampler.sample(
                    prompts.prompts(options.num_prompts),
                    group_size=options.group_size,
                    seed=options.seed * 100_003 + number,
                )
                stats = self.learner.step(rollouts)
                report, matched = self._publish(publisher)
                run.add_round(report, matched)
                run.add_step(rollouts, stats, report)
                table.add(
                    Step(
                        number=number,
                        reward=rollouts.mean_reward,
                        mean_reward=moving_mean(run.rewards, 10)[-1],
                        report=report,
                        matched=matched,
                        tokens_s=rollouts.num_tokens / rollouts.seconds,
                    )
                )
                if options.seconds is not None and time.perf_counter() - began >= options.seconds:
                    break
        run.seconds = time.perf_counter() - began

    def _publish(self, publisher: Any) -> tuple[Report, bool]:
        """Publish, then ask the server itself what it serves: the digest has to be the published one on both accounts."""
        self.server.check()
        report: Report = publisher.publish()
        status = self.client.get("/weightcast/status").raise_for_status().json()
        served = (status["weight_version"], status["digest"])
        return report, report.digests_match and served == (report.version, report.digest)

    def _expect_ready(self) -> None:
        reply = self.client.get("/ready")
        if reply.status_code != 200:
            raise EngineError(f"the server has weights and /ready answers {reply.status_code}: {reply.text[:200]}")


def _conclude(run: Run, console: Console) -> Verdict:
    """Print the curve, the figures and the checks; write the page."""

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    verdict = run.verdict()
    say("")
    console.print("\n".join(curve(moving_mean(run.rewards, 5), label="step")), highlight=False, markup=False)
    say(f"{'':10}reward, mean of 5 steps\n")
    for name, value in run.facts().items():
        say(f"  {name}: [bold]{value}[/bold]")
    if run.options.report is not None:
        say(f"  Page: {_write(run.options.report, run)}")
    for check in verdict.checks:
        say(f"  {'[green]✓[/green]' if check.passed else '[bold red]✗[/bold red]'} {check.text}")
    return verdict


def _write(path: Path, run: Run) -> Path:
    try:
        return write_page(path, page_of(run))
    except OSError as error:
        raise InvalidInput(f"the page cannot be written: {error}", field="report") from None
