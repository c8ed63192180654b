"""Tokens per second: the embedded engine against left-padded batched ``generate``, at mixed lengths.

All contenders answer the same requests (random prompt and output lengths) with the same random Qwen3 model, greedily, in
turns within one process; the table shows medians. Only the tokens that a request asked for count: what ``generate``
computes for rows that are done already is its own cost. Run it with OMP_WAIT_POLICY=PASSIVE.

    python benchmarks/engine_tokens.py                 # batch 1, 16, 64; about five minutes on two cores
    python benchmarks/engine_tokens.py --short         # one small cell, under a minute
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config

from weightcast.engines.embedded import LLM, SamplingParams
from weightcast.manifest.dtypes import dtype_of

SIZES = {
    "m2": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "vocab_size": 4096},
    "m20": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": 8192},
    "m150": {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 16, "vocab_size": 16384},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One request: a prompt and how many tokens it wants."""

    prompt: list[int]
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One row of the table: median tokens per second, and the engine's gain over ``generate``."""

    model: str
    dtype: str
    batch: int
    num_requests: int
    num_tokens: int
    engine: float
    generate: float
    continuous: float | None

    @property
    def gain(self) -> float:
        return self.engine / self.generate


def build(size: str, dtype: str, device: str) -> Any:
    """A random model of about the named number of million parameters."""
    config = Qwen3Config(
        **SIZES[size],
        num_attention_heads=SIZES[size]["hidden_size"] // 64,
        num_key_value_heads=max(1, SIZES[size]["hidden_size"] // 128),
        head_dim=64,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype_of(dtype)).to(device).eval()


def jobs(count: int, vocab: int, longest: int, rng: random.Random) -> list[Job]:
    """Prompts of 4 to ``longest`` tokens that want 4 to ``longest`` tokens."""
    return [
        Job(
            prompt=[rng.randrange(1, vocab) for _ in range(rng.randint(4, longest))],
            num_tokens=rng.randint(4, longest),
        )
        for _ in range(count)
    ]


def run_engine(llm: LLM, work: list[Job]) -> int:
    """Answer all jobs; returns how many tokens came back."""
    params = [SamplingParams(temperature=0, max_tokens=job.num_tokens, ignore_eos=True) for job in work]
    outputs = llm.generate([job.prompt for job in work], params)
    return sum(len(output.outputs[0].token_ids) for output in outputs)


@torch.no_grad()
def run_generate(model: Any, work: list[Job], batch: int) -> int:
    """Answer all jobs in left-padded batches, each as long as its longest answer."""
    total = 0
    for start in range(0, len(work), batch):
        part = work[start : start + batch]
        width = max(len(job.prompt) for job in part)
        ids = torch.tensor([[0] * (width - len(job.prompt)) + job.prompt for job in part], device=model.device)
        mask = torch.tensor(
            [[0] * (width - len(job.prompt)) + [1] * len(job.prompt) for job in part], device=model.device
        )
        longest = max(job.num_tokens for job in part)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=longest, do_sample=False)
        out[:, -1].tolist()
        total += sum(job.num_tokens for job in part)
    return total


@torch.no_grad()
def run_continuous(model: Any, work: list[Job]) -> int:
    """Answer all jobs by transformers' continuous batching."""
    config = GenerationConfig(max_new_tokens=1, do_sample=False, eos_token_id=-1, pad_token_id=0)
    total = 0
    with model.continuous_batching_context_manager(generation_config=config, timeout=60) as manager:
        for job in work:
            manager.add_request(job.prompt, max_new_tokens=job.num_tokens)
        for _ in work:
            output = manager.get_result(timeout=300)
            if output is None:
                raise SystemExit("continuous batching ended before all answers were there")
            total += len(output.generated_tokens)
    return total


def rate(run: Callable[[], int], expected: int) -> float:
    """Tokens per second of one run; a contender that answers too little is an error."""
    start = time.perf_counter()
    done = run()
    seconds = time.perf_counter() - start
    if done != expected:
        raise SystemExit(f"{done} tokens came back instead of {expected}")
    return done / seconds


def measure(options: argparse.Namespace, model: Any, batch: int) -> Cell:
    """All contenders in turns, ``repeats`` times, after one unmeasured turn."""
    rng = random.Random(options.seed)
    work = jobs(max(batch, batch * options.rounds), model.config.vocab_size, options.longest, rng)
    expected = sum(job.num_tokens for job in work)
    contenders: dict[str, Callable[[], int]] = {}
    llm = LLM(model, max_num_seqs=batch, num_threads=options.threads, device=options.device)
    contenders["engine"] = lambda: run_engine(llm, work)
    contenders["generate"] = lambda: run_generate(model, work, batch)
    if options.continuous:
        contenders["continuous"] = lambda: run_continuous(model, work)
    found: dict[str, list[float]] = {name: [] for name in contenders}
    with llm:
        for turn in range(options.repeats + 1):
            for name, run in contenders.items():
                value = rate(run, expected)
                if turn:
                    found[name].append(value)
    medians = {name: statistics.median(values) for name, values in found.items()}
    return Cell(
        model=options.model,
        dtype=options.dtype,
        batch=batch,
        num_requests=len(work),
        num_tokens=expected,
        engine=medians["engine"],
        generate=medians["generate"],
        continuous=medians.get("continuous"),
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="m20")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--rounds", type=int, default=2, help="requests per place in the batch")
    parser.add_argument("--longest", type=int, default=128, help="longest prompt and longest answer, in tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--continuous", action="store_true", help="also transformers' continuous batching")
    parser.add_argument("--short", action="store_true", help="one small cell")
    parser.add_argument("--json", type=Path, help="append the cells to this file, one JSON object a line")
    options = parser.parse_args()
    if options.short:
        options.model, options.batch, options.repeats, options.longest = "m2", [64], 2, 64
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    model = build(options.model, options.dtype, options.device)
    print(f"{options.model} {options.dtype} on {options.device}, {options.threads} threads; tokens per second")
    print(f"{'batch':>6} {'requests':>9} {'tokens':>7} {'engine':>9} {'generate':>9} {'continuous':>11} {'gain':>6}")
    for batch in options.batch:
        cell = measure(options, model, batch)
        other = "-" if cell.continuous is None else f"{cell.continuous:.0f}"
        print(
            f"{cell.batch:>6} {cell.num_requests:>9} {cell.num_tokens:>7} {cell.engine:>9.0f} {cell.generate:>9.0f}"
            f" {other:>11} {cell.gain:>5.2f}x",
            flush=True,
        )
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps({**asdict(cell), "gain": cell.gain}) + "\n")


if __name__ == "__main__":
    main()
