"""Places: whether every published tensor has a place in an engine, and which of them share one.

A round proves the bytes of landings. What has no landing would be dropped without a word, and of two tensors that land in the same
bytes only one could be live; so an engine is taken into the fleet only when every tensor lands in one of its workers, is named by
the user as unused, or is kept by the engine as one with another tensor that has the same values (tied weights).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from weightcast.errors import InvalidInput, PlanMismatch
from weightcast.layout import Layout, Placement, Region, contiguous_strides
from weightcast.layout.table import TENSOR
from weightcast.manifest import Manifest, TensorSpec
from weightcast.manifest.dtypes import itemsize_of
from weightcast.manifest.names import kind_of, matching, number_of, patterns_for, shown
from weightcast.plan import Holdings, Plan, compile_plan
from weightcast.record.coverage import overlapping

_COMPUTED = (
    "*rotary_emb.inv_freq",
    "*rotary_pos_emb.inv_freq",
    "*original_inv_freq",
    "*rotary_emb.cos_cached",
    "*rotary_emb.sin_cached",
    "*attn.masked_bias",
    "*attention.masked_bias",
    "*position_ids",
    "*relative_position_index",
)
"""Constants that old checkpoints list and models compute themselves."""
_MASKS = ("*attn.bias", "*attention.bias")
"""Causal masks of old checkpoints, where the tensor has their shape (1, 1, n, n)."""
_EMBEDDING = re.compile(r"emb|wte|shared")
"""What names of embeddings have in common; weights are tied to those."""
MOST_PATTERNS = 12


@dataclass(frozen=True, slots=True)
class Tie:
    """Two published tensors that an engine keeps once: what it wants of both is the same box, in the type ``dtype``."""

    names: tuple[str, str]
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: str
    is_lost: bool = False
    """The second tensor has no place: an engine with tied weights uses the first one for it."""

    def manifest(self) -> Manifest:
        """A manifest in which the values of both have the same positions, so that equal values have equal digests."""
        return Manifest.of([TensorSpec(name=_TIED, dtype=self.dtype, shape=self.shape)])

    def plan(self, name: str, holdings: Holdings) -> Plan:
        """Copies of one of the two tensors' box, as of the tensor in ``manifest()``."""
        nbytes = itemsize_of(self.dtype) * max(Region(name=name, offsets=self.offsets, sizes=self.sizes).numel, 1)
        wanted = Placement(
            region=Region(name=name, offsets=self.offsets, sizes=self.sizes),
            dtype=self.dtype,
            storage=0,
            offset=0,
            strides=contiguous_strides(self.sizes),
        )
        landings = Layout(placements=(wanted,), storage_nbytes=(nbytes,))
        return compile_plan(holdings.manifest, holdings, landings).as_of(self.manifest())

    def is_one_memory(self, holdings: Holdings) -> bool:
        """Whether both are the same memory on every trainer rank, as tied parameters of a module are: then they are equal, whatever
        the values."""
        one, other = (holdings.rows_of(holdings.manifest.numbers[name]) for name in self.names)
        return np.array_equal(holdings.ranks[one], holdings.ranks[other]) and np.array_equal(
            holdings.numbers[TENSOR + 1 :, one], holdings.numbers[TENSOR + 1 :, other]
        )

    def unequal(self) -> PlanMismatch:
        """What to raise when the values differ."""
        first, second = self.names
        if self.is_lost:
            return PlanMismatch(
                f"the engine has no place for {second!r}, and its values are not those of {first!r}, which a model with tied "
                "weights uses for both",
                hint="Tie them in the trainer, serve a model that does not tie them (tie_word_embeddings in its config), or name "
                f'it in unused=["{second}"] where the engine rightly does without it',
            )
        return PlanMismatch(
            f"{first!r} and {second!r} have different values, and the engine keeps them as one tensor",
            hint="Tie them in the trainer, or serve a model that does not tie them (tie_word_embeddings in its config)",
        )


_TIED = "tied"


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """What is special about an engine's places: tensors that it has none for, and those that share one."""

    unused: tuple[str, ...] = ()
    """Published tensors that the engine rightly does without, in the manifest's order."""
    ties: tuple[Tie, ...] = ()


def refuse_idle(patterns: Sequence[str], manifest: Manifest) -> None:
    """Raise InvalidInput that names a pattern which matches no tensor: it may be misspelt."""
    if not patterns:
        return
    names = [spec.name for spec in manifest.tensors]
    idle = [pattern for pattern in patterns if not matching([pattern], names)]
    if idle:
        raise InvalidInput(
            f"unused={idle[0]!r} matches none of the {number_of(len(names), 'tensor')}, {shown(names, 2)}",
            field="unused",
            hint="Patterns are those of a shell: * stands for any letters, dots too. Leave out what matches nothing",
        )


def places_of(manifest: Manifest, holdings: Holdings, layouts: Sequence[Layout], unused: Sequence[str] = ()) -> Places:
    """The places of one engine, whose workers have these layouts.

    Raises PlanMismatch for tensors that no worker has a use for, or that all workers together take only a part of, unless ``unused``
    (patterns) names them, and for tensors that land partly in the same bytes. A tensor without a place that may be tied to one that has a place comes as a tie: the values decide.
    """
    placed = {placement.region.name for layout in layouts for placement in layout.placements}
    placed |= {name for layout in layouts for name in layout.through_loader}
    ties = [tie for layout in layouts for tie in _shared(manifest, layout)]
    missing = [spec for spec in manifest.tensors if spec.name not in placed]
    left_out = matching(unused, [spec.name for spec in missing]) | {s.name for s in missing if is_computed(s)}
    candidates = [spec for spec in manifest.tensors if spec.name in placed] if missing else []
    homeless, maybe_tied = [], []
    for spec in missing:
        if spec.name not in left_out:
            partner = partner_of(spec, candidates)
            if partner is None:
                homeless.append(spec.name)
            else:
                whole = (0,) * len(spec.shape)
                maybe_tied.append(Tie((partner, spec.name), spec.shape, whole, spec.shape, spec.dtype, is_lost=True))
    if homeless:
        doubtful = {tie.names[1] for tie in maybe_tied if not tie.is_one_memory(holdings)}.union(homeless)
        raise _no_place([spec.name for spec in missing if spec.name in doubtful], manifest, placed)
    cut_short = _cut_short(manifest, layouts)
    rightly = matching(unused, cut_short)
    if wrongly := {name: taken for name, taken in cut_short.items() if name not in rightly}:
        raise _only_in_part(wrongly, manifest)
    left_out |= rightly
    return Places(
        unused=tuple(spec.name for spec in manifest.tensors if spec.name in left_out),
        ties=tuple(dict.fromkeys([*ties, *maybe_tied])),
    )


def _cut_short(manifest: Manifest, layouts: Sequence[Layout]) -> dict[str, int]:
    """Tensors of which all workers together want less than there is, and how many elements. Loaders of some engines take as much of a
    larger tensor as fits, without a word."""
    through = {name for layout in layouts for name in layout.through_loader}
    boxes = {placement.region for layout in layouts for placement in layout.placements}
    taken: dict[str, int] = {}
    for box in boxes:
        taken[box.name] = taken.get(box.name, 0) + box.numel
    return {name: count for name, count in taken.items() if name not in through and count < manifest[name].numel}


def is_computed(spec: TensorSpec) -> bool:
    """Whether a tensor is a constant that models compute themselves and no loader needs."""
    is_mask = len(spec.shape) == 4 and spec.shape[:2] == (1, 1) and bool(matching(_MASKS, [spec.name]))
    return is_mask or bool(matching(_COMPUTED, [spec.name]))


def partner_of(spec: TensorSpec, placed: Iterable[TensorSpec]) -> str | None:
    """The first tensor with a place that an engine with tied weights may use for this one: an embedding for the head of the same
    form, or the other way round."""
    if len(spec.shape) < 2:
        return None
    alike = (o.name for o in placed if (o.shape, o.dtype) == (spec.shape, spec.dtype))
    roles = (name for name in alike if kind_of(name) != kind_of(spec.name))
    return next((name for name in roles if _EMBEDDING.search(name) or _EMBEDDING.search(spec.name)), None)


def _no_place(names: Sequence[str], manifest: Manifest, placed: set[str]) -> PlanMismatch:
    patterns = patterns_for(names, placed)
    more = f" and {len(patterns) - MOST_PATTERNS} more patterns" if len(patterns) > MOST_PATTERNS else ""
    listed = ", ".join(f'"{pattern}"' for pattern in patterns[:MOST_PATTERNS])
    return PlanMismatch(
        f"the engine has no place for {len(names)} of {number_of(len(manifest), 'published tensor')}: {shown(names)}",
        hint="Publish the model that the engine serves. "
        f"Where the engine rightly does without them, name them: unused=[{listed}]{more}",
    )


def _only_in_part(taken: Mapping[str, int], manifest: Manifest) -> PlanMismatch:
    told = [
        f"{name} {manifest[name].shape} ({count} of {manifest[name].numel} elements)"
        for name, count in sorted(taken.items())
    ]
    return PlanMismatch(
        f"the engine's model is smaller: {len(told)} of {number_of(len(manifest), 'published tensor')} land only in part: {shown(told)}",
        hint="Publish the model that the engine serves",
    )


def _shared(manifest: Manifest, layout: Layout) -> Iterable[Tie]:
    """Tensors of which a worker keeps the same box in the same bytes."""
    placements = _candidates(layout.placements)
    for first, second in overlapping(placements):
        one, other = placements[first], placements[second]
        if one.region.name == other.region.name:
            continue
        spec, shape = manifest[one.region.name], manifest[other.region.name].shape
        where = [(p.region.offsets, p.region.sizes, p.dtype, p.offset, p.strides) for p in (one, other)]
        if where[0] != where[1] or spec.shape != shape:
            raise PlanMismatch(
                f"{one.region.name!r} and {other.region.name!r} land partly in the same bytes of the engine",
                hint="Publish only one of them",
            )
        yield Tie((one.region.name, other.region.name), shape, one.region.offsets, one.region.sizes, one.dtype)


def _candidates(placements: Sequence[Placement]) -> list[Placement]:
    """Placements whose first to last byte meet those of another one: few, so that only they are looked at byte by byte."""
    spans = sorted(
        (p.storage, p.offset * itemsize_of(p.dtype), p.end_nbytes, number)
        for number, p in enumerate(placements)
        if p.region.numel
    )
    found: set[int] = set()
    storage, furthest, owner = -1, 0, -1
    for where, start, end, number in spans:
        if where == storage and start < furthest:
            found |= {number, owner}
        if where != storage or end > furthest:
            storage, furthest, owner = where, end, number
    return [placements[number] for number in sorted(found)]
