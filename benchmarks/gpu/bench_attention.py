"""The embedded engine's attention beside torch's plain scaled_dot_product_attention.

Shapes are those of Qwen3 0.6B. The groups of a step, their rows and shelves are planned by the engine's own cache and runner for
sequences of random lengths; then every layer stores its keys and values and attends, as in a forward pass. Plain is one call
over contiguous tensors of the same values and shapes: it has nothing to store, to look up or to write to a packed row. Times
are per layer, the work that is done once a step (masks) spread over all of them; rates count the keys and values that are read.

The last rows decode with the whole engine and say how much of a step its attention takes.

    python benchmarks/gpu/bench_attention.py
    python benchmarks/gpu/bench_attention.py --device cpu --layers 2 --batch 1 4 --context 24 --prompt 40 --model m2
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from common import Table, gpu_ms
from shapes import SHAPES
from torch.nn.functional import scaled_dot_product_attention

from weightcast.engines.embedded import LLM, SamplingParams
from weightcast.engines.embedded.attention import (
    ATTENTION_NAME,
    DecodeGroup,
    Group,
    PromptGroup,
    StepContext,
    packed_attention,
    register_attention,
)
from weightcast.engines.embedded.kv import KvCache
from weightcast.engines.embedded.runner import ModelRunner
from weightcast.engines.embedded.scheduler import Work
from weightcast.engines.embedded.sequence import Request
from weightcast.engines.embedded.sequence import Sequence as Running
from weightcast.manifest.dtypes import dtype_of

SHAPE = SHAPES["0.6B"]
NUM_CACHED_LAYERS = 4
"""Layers with keys and values of their own; the others of a step use them again, so that the longest contexts fit."""
TOLERANCE = {"bfloat16": 1e-2, "float32": 1e-4}
NUM_TOKENS = 48
"""Asked of every request of the rows about whole steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Sequences of one step: how many tokens each has in the cache, and how many the step computes of each."""

    name: str
    past: tuple[int, ...]
    count: int


class _Shelves:
    """A step of sequences in the engine's own KV cache, with random keys and values, and the groups of its plan."""

    def __init__(self, case: Case, options: argparse.Namespace, dtype: torch.dtype) -> None:
        longest = 2 * max(past + case.count for past in case.past)
        device = torch.device(options.device)
        cache = KvCache(2 * len(case.past) * longest, longest, max_rows=len(case.past))
        work = [Work(sequence=_running(past, case.count), count=case.count) for past in case.past]
        for item in work:
            assert cache.place(item.sequence, len(item.sequence.tokens) + 1)
        self.groups = _planned(cache, work, device)
        self._past = [(item.sequence.shelf, item.sequence.row, item.sequence.num_computed) for item in work]
        num_tokens = case.count * len(work)
        self.q = [_packed(num_tokens, SHAPE.heads, device, dtype) for _ in range(NUM_CACHED_LAYERS)]
        self.k = [_packed(num_tokens, SHAPE.kv_heads, device, dtype) for _ in range(NUM_CACHED_LAYERS)]
        self.v = [_packed(num_tokens, SHAPE.kv_heads, device, dtype) for _ in range(NUM_CACHED_LAYERS)]
        for layer in range(NUM_CACHED_LAYERS):
            self._fill(layer)
        self._modules = [SimpleNamespace(layer_idx=layer, is_causal=True) for layer in range(NUM_CACHED_LAYERS)]

    def _fill(self, layer: int) -> None:
        """Random values where a sequence has tokens, zeros elsewhere, as the engine leaves them."""
        for shelf, row, past in self._past:
            assert shelf is not None
            for tensor in shelf.layer(layer, self.k[layer][0], self.v[layer][0]):
                tensor[row, :, :past].normal_()

    def step(self, num_layers: int) -> torch.Tensor:
        """All layers of one step; the first one's output, (tokens, heads, size)."""
        context = StepContext(groups=self.groups)
        outputs = [self._layer(number % NUM_CACHED_LAYERS, context) for number in range(num_layers)]
        return outputs[0][0]

    def _layer(self, layer: int, context: StepContext) -> torch.Tensor:
        module: Any = self._modules[layer]
        q, k, v = self.q[layer], self.k[layer], self.v[layer]
        return packed_attention(module, q, k, v, None, scaling=SHAPE.head_dim**-0.5, step=context)[0]

    def plain(self) -> Callable[[int], torch.Tensor]:
        """A function like ``step`` that calls scaled_dot_product_attention alone, on contiguous copies."""
        prepared = [_contiguous(self.groups, layer, self.q[layer], self.k[layer]) for layer in range(NUM_CACHED_LAYERS)]

        def run(num_layers: int) -> torch.Tensor:
            outputs = []
            for number in range(num_layers):
                q, k, v, mask, causal = prepared[number % NUM_CACHED_LAYERS]
                outputs.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal))
            return _unfolded(outputs[0], isinstance(self.groups[0], DecodeGroup))

        return run


def _running(past: int, count: int) -> Running:
    request = Request(
        request_id="", prompt=None, prompt_token_ids=[], params=SamplingParams(), sink=lambda _: None, stream=False
    )
    return Running(
        request=request,
        index=0,
        tokens=[0] * (past + count),
        num_prompt=past + count,
        rng=random.Random(0),
        detokenizer=None,
        num_computed=past,
    )


def _planned(cache: KvCache, work: Sequence[Work], device: torch.device) -> list[Group]:
    """The groups that the engine's runner makes of this work: a stand-in for the model takes them in place of a forward pass."""
    seen: list[StepContext] = []

    class Model:
        def __init__(self) -> None:
            self.device = device

        def __call__(self, *, step: StepContext, logits_to_keep: torch.Tensor, **_: object) -> SimpleNamespace:
            seen.append(step)
            return SimpleNamespace(logits=torch.zeros(1, len(logits_to_keep), 1, device=device))

    past = [item.sequence.num_computed for item in work]
    ModelRunner(Model(), cache).forward(work)
    for item, computed in zip(work, past, strict=True):
        item.sequence.num_computed = computed
    return seen[0].groups


def _packed(num_tokens: int, heads: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(1, heads, tokens, size) with the strides that modelling code gives it."""
    return torch.randn(1, num_tokens, heads, SHAPE.head_dim, device=device, dtype=dtype).transpose(1, 2)


Plain = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, bool]
"""Queries, keys, values, additive mask, whether causal."""


def _contiguous(groups: Sequence[Group], layer: int, q: torch.Tensor, k: torch.Tensor) -> Plain:
    """What one plain call takes for a step, once its keys and values are in the shelves."""
    first = groups[0]
    if isinstance(first, DecodeGroup):
        return _contiguous_decode([g for g in groups if isinstance(g, DecodeGroup)], layer, q)
    assert len(groups) == 1
    if isinstance(first, PromptGroup):
        rows, end, past = first.rows, first.length, 0
    else:
        rows, end, past = torch.tensor([first.row], device=q.device), first.past + q.shape[2], first.past
    repeats = q.shape[1] // k.shape[1]
    keys, values = (x[rows, :, :end].repeat_interleave(repeats, dim=1) for x in first.shelf.layers[layer])
    mask = None
    if past:
        at = torch.arange(end, device=q.device)
        mask = torch.zeros(end - past, end, device=q.device, dtype=q.dtype)
        mask.masked_fill_(at > at[past:, None], float("-inf"))
    return q.contiguous(), keys, values, mask, mask is None


def _contiguous_decode(groups: Sequence[DecodeGroup], layer: int, q: torch.Tensor) -> Plain:
    """All rows of all groups as one batch, as long as the longest."""
    longest = max(group.longest for group in groups)
    keys, values = [], []
    for group in groups:
        for into, tensor in zip((keys, values), group.shelf.layers[layer], strict=True):
            part = tensor[group.rows][:, :, : group.longest]
            into.append(torch.nn.functional.pad(part, (0, 0, 0, longest - group.longest)))
    folded = q[0].transpose(0, 1).reshape(q.shape[2], keys[0].shape[1], -1, q.shape[-1]).contiguous()
    lengths = torch.cat([group.positions for group in groups]) + 1
    mask = None
    if int(lengths.min()) < longest:
        seen = torch.arange(longest, device=q.device) < lengths[:, None]
        mask = torch.zeros(seen.shape, device=q.device, dtype=q.dtype)
        mask = mask.masked_fill_(~seen, float("-inf"))[:, None, None]
    return folded, torch.cat(keys), torch.cat(values), mask, False


def _unfolded(out: torch.Tensor, decodes: bool) -> torch.Tensor:
    """(tokens, heads, size)."""
    return out.reshape(out.shape[0], -1, out.shape[-1]) if decodes else out[0].transpose(0, 1)


def milliseconds(call: Callable[[], object], device: str) -> float:
    """Median of some calls; by the host's clock on a CPU."""
    if device == "cuda":
        return gpu_ms(call)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[1:])


def measure(table: Table, case: Case, dtype: str, options: argparse.Namespace) -> None:
    """One row: the engine's way, and in the note the plain call and how far apart their outputs are."""
    shelves = _Shelves(case, options, dtype_of(dtype))
    ours = shelves.step(NUM_CACHED_LAYERS)
    run_plain = shelves.plain()
    plain = run_plain(1)
    assert ours.shape == plain.shape, f"{tuple(ours.shape)} and {tuple(plain.shape)}"
    difference = float((ours.double() - plain.double()).abs().max() / plain.double().abs().max())
    assert difference < TOLERANCE[dtype], f"the outputs are {difference:.1e} apart"
    ours_ms = milliseconds(lambda: shelves.step(options.layers), options.device) / options.layers
    plain_ms = milliseconds(lambda: run_plain(options.layers), options.device) / options.layers
    heads = 2 * SHAPE.kv_heads
    nbytes = sum(past + case.count for past in case.past) * heads * SHAPE.head_dim * dtype_of(dtype).itemsize
    groups = f"; {len(shelves.groups)} groups" if len(shelves.groups) > 1 else ""
    note = f"plain {plain_ms:.3f} ms, x{ours_ms / plain_ms:.2f}; difference {difference:.0e}{groups}"
    table.add(f"{case.name}, {dtype}", ours_ms, nbytes, note)


def cases(options: argparse.Namespace) -> list[Case]:
    """Decoding with contexts that are all equal, and with mixed ones of half the length and more; prompts, and one's last piece."""
    found = []
    for batch in options.batch:
        for context in options.context:
            found.append(Case(name=f"decode {batch} x {context}", past=(context,) * batch, count=1))
            if batch > 1:
                mixed = [context, *(random.randint(context // 2, context) for _ in range(batch - 1))]
                random.shuffle(mixed)
                found.append(Case(name=f"decode {batch} x {context}, mixed", past=tuple(mixed), count=1))
    found += [Case(name=f"prompt of {length}", past=(0,), count=length) for length in options.prompt]
    last = options.prompt[-1] // 4
    return [*found, Case(name=f"piece of {last} after {3 * last}", past=(3 * last,), count=last)]


@dataclass(slots=True)
class Step:
    """Marks of one forward pass: its start and end, and those of attention in every layer."""

    decodes: bool
    """One token of every request of the batch."""
    start: Any
    end: Any = None
    attention: list[tuple[Any, Any]] = field(default_factory=list)


class Clock:
    """Marks in time: events on a GPU, which include its waits for the host; the host's clock on a CPU."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device == "cuda"

    def mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) if self._on_gpu else (end - start) * 1e3


@contextlib.contextmanager
def watched(runner: Any, clock: Clock, batch: int) -> Iterator[list[Step]]:
    """All steps of a runner, and the attention of all models, marked."""
    from transformers import AttentionInterface

    steps: list[Step] = []
    forward = runner.forward

    def marked_forward(work: Sequence[Work]) -> Any:
        decodes = len(work) == batch and all(item.count == 1 for item in work)
        steps.append(Step(decodes=decodes, start=clock.mark()))
        logits = forward(work)
        steps[-1].end = clock.mark()
        return logits

    def marked_attention(*args: Any, **kwargs: Any) -> Any:
        start = clock.mark()
        result = packed_attention(*args, **kwargs)
        steps[-1].attention.append((start, clock.mark()))
        return result

    runner.forward = marked_forward
    AttentionInterface.register(ATTENTION_NAME, marked_attention)
    try:
        yield steps
    finally:
        runner.forward = forward
        register_attention()


def share(table: Table, dtype: str, options: argparse.Namespace) -> None:
    """One row: a step of decoding with the whole engine, from its start to the start of the next, and what attention takes of it."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from engine_tokens import build, jobs

    batch, clock = max(options.batch), Clock(options.device)
    model = build(options.model, dtype, options.device)
    work = jobs(batch, model.config.vocab_size, 128, random.Random())
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    with LLM(model, max_num_seqs=batch, num_threads=1, device=options.device) as llm:
        prompts = [job.prompt for job in work]
        llm.generate(prompts, params)
        with watched(llm.engine.core._runner, clock, batch) as steps:
            llm.generate(prompts, params)
    if options.device == "cuda":
        torch.cuda.synchronize()
    pairs = [(now, after) for now, after in pairwise(steps) if now.decodes and after.decodes]
    assert pairs, "no step decoded the whole batch"
    whole_ms = [clock.ms(now.start, after.start) for now, after in pairs]
    forward_ms = [clock.ms(now.start, now.end) for now, _ in pairs]
    attention_ms = [sum(clock.ms(*span) for span in now.attention) for now, _ in pairs]
    whole, forward, attention = (statistics.median(times) for times in (whole_ms, forward_ms, attention_ms))
    note = (
        f"attention {attention:.2f} ms in {len(pairs[0][0].attention)} layers, {attention / whole:.0%} of the step; "
        f"forward pass {forward:.2f} ms; rate of the weights; {len(pairs)} steps"
    )
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    table.add(f"{options.model} decodes {batch}, {dtype}: a whole step", whole, nbytes, note)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtypes", nargs="+", choices=TOLERANCE, default=list(TOLERANCE))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--context", type=int, nargs="+", default=[128, 512, 2048], help="tokens in the cache")
    parser.add_argument("--prompt", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--layers", type=int, default=SHAPE.layers)
    parser.add_argument("--model", default="m150", help="of the rows about whole steps; a size of engine_tokens.py")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    options = parse()
    table = Table("attention")
    rows = [(partial(measure, table, case), case.name) for case in cases(options)]
    rows.append((partial(share, table), f"{options.model}: a whole step"))
    for dtype in options.dtypes:
        for run, name in rows:
            try:
                run(dtype, options)
            except (AssertionError, RuntimeError) as error:
                table.fail(f"{name}, {dtype}", error)
    if options.device == "cuda":
        table.save()
    table.exit()


if __name__ == "__main__":
    main()
