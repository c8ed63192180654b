"""One forward pass: packs the scheduled tokens, calls the model, gives back the logits that somebody wants."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from weightcast.engines.embedded.adapters import Adapters, AdapterVersion, StepPart
from weightcast.engines.embedded.attention import AttentionGroup, DecodeGroup, PieceGroup, PromptGroup, StepContext
from weightcast.engines.embedded.kv import KvCache, Shelf
from weightcast.engines.embedded.scheduler import Work
from weightcast.errors import Unsupported


@dataclass(slots=True, kw_only=True)
class StepLogits:
    """Rows of logits, in order: one row to sample from for each of ``samples``, then one row for each ``scored`` position of a prompt."""

    samples: list[Work]
    sample_logits: torch.Tensor
    scored: list[tuple[Work, int]]
    """(work, position of the token that the row predicts)"""
    scored_logits: torch.Tensor


class _Pack:
    """Numbers of one step, sent to the device in a single transfer."""

    def __init__(self) -> None:
        self._numbers: list[int] = []

    def add(self, numbers: Seq[int]) -> slice:
        start = len(self._numbers)
        self._numbers.extend(numbers)
        return slice(start, len(self._numbers))

    def on(self, device: torch.device) -> torch.Tensor:
        host = torch.tensor(self._numbers, dtype=torch.int64)
        if device.type == "cuda":
            return host.pin_memory().to(device, non_blocking=True)
        return host.to(device)


class ModelRunner:
    """Runs the model over packed steps. Refers to no parameter, because parameters may be rebound between two steps."""

    def __init__(self, model: Any, cache: KvCache, adapters: Adapters) -> None:
        self._model = model
        self._adapters = adapters
        self._cache = cache
        self.device: torch.device = model.device

    @torch.no_grad()
    def forward(self, work: Seq[Work]) -> StepLogits:
        """Compute the scheduled tokens, store their keys and values, and advance ``num_computed``."""
        ordered = self._ordered(work)
        pack = _Pack()
        ids = pack.add([t for item in ordered for t in _tokens(item)])
        positions = pack.add([p for item in ordered for p in _positions(item)])
        samples, scored, wanted = _wanted(ordered)
        rows = pack.add(wanted)
        plans = self._plan_groups(ordered, pack)
        versions = _plan_versions(ordered, wanted, pack)
        sent = pack.on(self.device)
        context = StepContext(groups=[plan.group(sent) for plan in plans])
        parts = [
            StepPart(version=version, rows=_sent(sent, mine), kept=_sent(sent, kept))
            for version, mine, kept in versions
        ]
        with self._adapters.computing(parts):
            output = self._model(
                input_ids=sent[ids].unsqueeze(0),
                position_ids=sent[positions].unsqueeze(0),
                use_cache=False,
                logits_to_keep=sent[rows],
                step=context,
            )
        self._check(output.logits, len(wanted))
        for item in work:
            item.sequence.num_computed += item.count
        logits = output.logits[0]
        return StepLogits(
            samples=samples,
            sample_logits=logits[: len(samples)],
            scored=scored,
            scored_logits=logits[len(samples) :],
        )

    def _check(self, logits: torch.Tensor, num_wanted: int) -> None:
        if logits.shape[1] != num_wanted:
            raise Unsupported(f"{type(self._model).__name__} does not take logits_to_keep as positions")

    def _ordered(self, work: Seq[Work]) -> list[Work]:
        shelves = {id(shelf): number for number, shelf in enumerate(self._cache.shelves)}

        def key(item: Work) -> tuple[int, int, int, int]:
            shelf = shelves[id(item.sequence.shelf)]
            if item.count == 1:
                return 0, shelf, item.sequence.row, 0
            if item.sequence.num_computed == 0:
                return 1, shelf, item.count, item.sequence.row
            return 2, shelf, item.sequence.row, 0

        return sorted(work, key=key)

    @staticmethod
    def _plan_groups(ordered: Seq[Work], pack: _Pack) -> list[_GroupPlan]:
        plans: list[_GroupPlan] = []
        start = 0
        for (kind, _, _), items in groupby(ordered, key=_kind):
            members = list(items)
            stop = start + sum(item.count for item in members)
            plans.append(_GroupPlan(kind, members, start, stop, pack))
            start = stop
        return plans


class _GroupPlan:
    """A group of neighbours in the pack that attention handles in one call, before its numbers are on the device."""

    def __init__(self, kind: int, members: list[Work], start: int, stop: int, pack: _Pack) -> None:
        self._kind = kind
        self._start = start
        self._stop = stop
        shelf = members[0].sequence.shelf
        assert shelf is not None
        self._shelf: Shelf = shelf
        self._rows = [item.sequence.row for item in members]
        self._past = [item.sequence.num_computed for item in members]
        self._count = members[0].count
        self._sent_rows = pack.add(self._rows)
        self._sent_past = pack.add(self._past)

    def group(self, sent: torch.Tensor) -> AttentionGroup:
        if self._kind == 0:
            first, last = self._rows[0], self._rows[-1]
            neighbours = last - first + 1 == len(self._rows)
            return DecodeGroup(
                shelf=self._shelf,
                start=self._start,
                stop=self._stop,
                rows=sent[self._sent_rows],
                view=slice(first, last + 1) if neighbours else None,
                positions=sent[self._sent_past],
                longest=max(self._past) + 1,
                even=min(self._past) == max(self._past),
            )
        if self._kind == 1:
            return PromptGroup(
                shelf=self._shelf,
                start=self._start,
                stop=self._stop,
                rows=sent[self._sent_rows],
                length=self._count,
            )
        return PieceGroup(shelf=self._shelf, start=self._start, stop=self._stop, row=self._rows[0], past=self._past[0])


def _kind(item: Work) -> tuple[int, int, int]:
    """Neighbours with the same value form a group."""
    shelf = id(item.sequence.shelf)
    if item.count == 1:
        return 0, shelf, 0
    if item.sequence.num_computed == 0:
        return 1, shelf, item.count
    return 2, shelf, item.sequence.row


def _plan_versions(
    ordered: Seq[Work], wanted: Seq[int], pack: _Pack
) -> list[tuple[AdapterVersion, slice | None, slice | None]]:
    """The rows of each adapter's version in the step, and among those whose logits are wanted; None where these are all."""
    owners = [item.sequence.request.adapter_version for item in ordered for _ in range(item.count)]
    versions = [version for version in dict.fromkeys(owners) if version is not None]
    if len(versions) == 1 and None not in owners:
        return [(versions[0], None, None)]
    return [
        (
            version,
            pack.add([row for row, owner in enumerate(owners) if owner is version]),
            pack.add([at for at, row in enumerate(wanted) if owners[row] is version]),
        )
        for version in versions
    ]


def _sent(sent: torch.Tensor, part: slice | None) -> torch.Tensor | None:
    return None if part is None else sent[part]


def _tokens(item: Work) -> list[int]:
    start = item.sequence.num_computed
    return item.sequence.tokens[start : start + item.count]


def _positions(item: Work) -> range:
    return range(item.sequence.num_computed, item.sequence.num_computed + item.count)


def _wanted(ordered: Seq[Work]) -> tuple[list[Work], list[tuple[Work, int]], list[int]]:
    """Who needs logits, and the packed positions they come from."""
    samples: list[Work] = []
    sample_rows: list[int] = []
    scored: list[tuple[Work, int]] = []
    scored_rows: list[int] = []
    start = 0
    for item in ordered:
        if item.completes:
            samples.append(item)
            sample_rows.append(start + item.count - 1)
        for position in _unscored(item):
            scored.append((item, position))
            scored_rows.append(start + position - 1 - item.sequence.num_computed)
        start += item.count
    return samples, scored, sample_rows + scored_rows


def _unscored(item: Work) -> range:
    """Prompt positions whose log-probability is asked for, unknown yet, and predicted by this work's tokens."""
    sequence = item.sequence
    known = sequence.request.prompt_logprobs
    if known is None or sequence.index != 0:
        return range(0)
    first = sequence.num_computed + 1
    stop = min(first + item.count, sequence.num_prompt)
    return range(max(first, len(known)), stop)
