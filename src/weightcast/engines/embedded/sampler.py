"""From logits to tokens, for a batch of sequences with different sampling parameters.

A row's result depends on its own logits and its own random numbers only, never on what else is in the batch. Log-
probabilities are those of the distribution that was sampled from (for greedy rows: before temperature and truncation).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch

from weightcast.engines.embedded.sequence import Sequence

_FIRST_CANDIDATES = 256
"""Truncation looks at so many of the likeliest tokens before it sorts a whole row."""


@dataclass(slots=True, kw_only=True)
class Sampled:
    """A token with its log-probability and rank, and the likeliest tokens; ``finite`` is False for broken logits."""

    token: int
    finite: bool
    logprob: float = 0.0
    rank: int = 0
    top: list[tuple[int, float]] = field(default_factory=list)


def sample(logits: torch.Tensor, rows: Seq[Sequence], banned: Seq[Seq[int]]) -> list[Sampled]:
    """Sample one token per row. ``banned[i]`` are ids that row i must not produce now."""
    logits = _precise(logits)
    _constrain(logits, rows, banned)
    _ban(logits, rows, banned)
    _bias(logits, rows)
    _penalise(logits, rows)
    wants = [row.params.logprobs for row in rows]
    if all(row.greedy for row in rows) and all(want is None for want in wants):
        best = logits.max(dim=-1)
        return _unpack(torch.stack((best.indices.double(), best.values.double()), dim=1))
    _temper(logits, rows)
    _truncate(logits, rows)
    logprobs = torch.log_softmax(logits, dim=-1)
    tokens = _choose(logprobs, rows)
    num_top = max((want for want in wants if want is not None), default=0)
    return _unpack(_describe(logprobs, tokens, num_top, ranks=any(want is not None for want in wants)))


def score(logits: torch.Tensor, tokens: Seq[int], num_top: int) -> list[Sampled]:
    """Log-probabilities of given tokens under the raw distribution, one per row."""
    logprobs = torch.log_softmax(_precise(logits), dim=-1)
    chosen = torch.tensor(tokens, device=logits.device)
    return _unpack(_describe(logprobs, chosen, num_top, ranks=True))


def _precise(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32, copy=True)


def _constrain(logits: torch.Tensor, rows: Seq[Sequence], banned: Seq[Seq[int]]) -> None:
    """Leave each row that has a grammar the tokens that the grammar allows, less the banned ones unless those are all."""
    for number, row in enumerate(rows):
        if row.grammar is not None:
            allowed = row.grammar.allowed(logits.shape[1])
            wanted = allowed.clone()
            wanted[[token for token in banned[number] if token < len(wanted)]] = False
            kept = wanted if wanted.any() else allowed
            logits[number].masked_fill_(~kept.to(logits.device), float("-inf"))


def _ban(logits: torch.Tensor, rows: Seq[Sequence], banned: Seq[Seq[int]]) -> None:
    vocab = logits.shape[1]
    places = [
        (number, token)
        for number, tokens in enumerate(banned)
        for token in tokens
        if token < vocab and rows[number].grammar is None
    ]
    if places:
        index = torch.tensor(places, device=logits.device)
        logits[index[:, 0], index[:, 1]] = float("-inf")


def _bias(logits: torch.Tensor, rows: Seq[Sequence]) -> None:
    for number, row in enumerate(rows):
        if row.params.logit_bias:
            tokens = torch.tensor(list(row.params.logit_bias), device=logits.device)
            values = list(row.params.logit_bias.values())
            logits[number, tokens] += torch.tensor(values, dtype=logits.dtype, device=logits.device)


def _penalise(logits: torch.Tensor, rows: Seq[Sequence]) -> None:
    """First the repetition penalty over all tokens of prompt and output, as in CTRL: seen tokens move towards unlikely. Then the
    frequency and the presence penalty, over the output alone, as OpenAI defines them."""
    for number, row in enumerate(rows):
        params = row.params
        if params.repetition_penalty != 1.0:
            seen = torch.unique(torch.tensor(row.tokens)).to(logits.device)
            values = logits[number, seen]
            penalty = params.repetition_penalty
            logits[number, seen] = torch.where(values > 0, values / penalty, values * penalty)
        if (params.frequency_penalty or params.presence_penalty) and row.num_output:
            tokens, counts = torch.unique(torch.tensor(row.tokens[row.num_prompt :]), return_counts=True)
            taken = params.frequency_penalty * counts.to(logits.dtype) + params.presence_penalty
            logits[number, tokens.to(logits.device)] -= taken.to(logits.device)


def _temper(logits: torch.Tensor, rows: Seq[Sequence]) -> None:
    temperatures = [1.0 if row.greedy else row.params.temperature for row in rows]
    if any(value != 1.0 for value in temperatures):
        logits /= torch.tensor(temperatures, dtype=logits.dtype, device=logits.device).unsqueeze(1)


def _truncate(logits: torch.Tensor, rows: Seq[Sequence]) -> None:
    """min_p, then top_k, then top_p, in place; at least one token stays."""
    free = [number for number, row in enumerate(rows) if not row.greedy]
    min_p = [number for number in free if rows[number].params.min_p > 0]
    if min_p:
        part = logits[min_p]
        bound = torch.tensor([rows[number].params.min_p for number in min_p], dtype=part.dtype, device=part.device)
        floor = part.amax(dim=-1, keepdim=True) + bound.log().unsqueeze(1)
        logits[min_p] = part.masked_fill_(part < floor, float("-inf"))
    vocab = logits.shape[1]
    cut = [number for number in free if rows[number].params.top_p < 1 or 0 < rows[number].params.top_k < vocab]
    if cut:
        logits[cut] = _cut(logits[cut], [rows[number] for number in cut])


def _cut(logits: torch.Tensor, rows: Seq[Sequence]) -> torch.Tensor:
    """top_k and top_p by a floor per row, found among the likeliest tokens; whole rows are sorted only if needed."""
    vocab = logits.shape[1]
    ks = [row.params.top_k if 0 < row.params.top_k < vocab else vocab for row in rows]
    ps = torch.tensor([row.params.top_p for row in rows], dtype=logits.dtype, device=logits.device).unsqueeze(1)
    limited = [k for k in ks if k < vocab]
    width = min(vocab, max([_FIRST_CANDIDATES, *limited]))
    if logits.is_cuda:
        width = vocab  # asking whether a part was enough would wait for the device
    keep = torch.tensor(ks, device=logits.device).unsqueeze(1)
    floor, covered = _floor(logits, keep, ps, width)
    if width < vocab and not bool(covered.all()):
        whole, _ = _floor(logits, keep, ps, vocab)
        floor = torch.where(covered, floor, whole)
    return logits.masked_fill(logits < floor, float("-inf"))


def _floor(
    logits: torch.Tensor, keep: torch.Tensor, top_p: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest logit that stays, per row, looking at ``width`` tokens; and whether those were enough."""
    vocab = logits.shape[1]
    top = torch.topk(logits, width, dim=-1).values
    within_k = torch.arange(width, device=logits.device) < keep
    total = torch.where(
        keep < vocab,
        top.masked_fill(~within_k, float("-inf")).logsumexp(dim=-1, keepdim=True),
        logits.logsumexp(dim=-1, keepdim=True),
    )
    probs = (top - total).exp()
    before = probs.cumsum(dim=-1) - probs
    stays = within_k & ((before < top_p) | (top_p >= 1))
    stays[:, 0] = True
    last = stays.sum(dim=-1, keepdim=True) - 1
    no_floor = (keep >= vocab) & (top_p >= 1)
    floor = top.gather(1, last).masked_fill(no_floor, float("-inf"))
    return floor, no_floor | (last < width - 1) | (keep <= width)


def _choose(logprobs: torch.Tensor, rows: Seq[Sequence]) -> torch.Tensor:
    """The likeliest token of greedy rows; of the others the one whose share of [0, 1) holds the row's next number."""
    free = [number for number, row in enumerate(rows) if not row.greedy]
    tokens = logprobs.argmax(dim=-1)
    if free:
        part = logprobs if len(free) == len(rows) else logprobs[free]
        shares = part.double().exp().cumsum(dim=-1)
        total = shares[:, -1:]
        numbers = torch.tensor([rows[number].rng.random() for number in free], dtype=torch.float64)
        target = torch.minimum(numbers.to(logprobs.device).unsqueeze(1) * total, total.nextafter(total - 1))
        drawn = torch.searchsorted(shares, target, right=True).squeeze(1).clamp_(max=logprobs.shape[1] - 1)
        tokens[free] = drawn
    return tokens


def _describe(logprobs: torch.Tensor, tokens: torch.Tensor, num_top: int, *, ranks: bool) -> torch.Tensor:
    """One row of numbers per token, so that one transfer brings everything to the host."""
    chosen = logprobs.gather(1, tokens.unsqueeze(1))
    columns = [tokens.unsqueeze(1).double(), chosen.double()]
    if ranks:
        columns.append((logprobs > chosen).sum(dim=-1, keepdim=True).double() + 1)
    if num_top:
        top = torch.topk(logprobs, min(num_top, logprobs.shape[1]), dim=-1)
        columns += [top.indices.double(), top.values.double()]
    return torch.cat(columns, dim=1)


def _unpack(columns: torch.Tensor) -> list[Sampled]:
    found = []
    for numbers in columns.tolist():
        value = numbers[1]
        finite = value == value and value not in (float("inf"), float("-inf"))
        item = Sampled(token=int(numbers[0]), finite=finite, logprob=value)
        if len(numbers) > 2:
            item.rank = int(numbers[2])
            half = (len(numbers) - 3) // 2
            ids = numbers[3 : 3 + half]
            item.top = [(int(token), logprob) for token, logprob in zip(ids, numbers[3 + half :], strict=True)]
        found.append(item)
    return found
