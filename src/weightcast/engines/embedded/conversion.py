"""Checkpoint tensors into a live transformers model, in place, through transformers' own weight conversions.

transformers fuses and renames while it loads (per-expert tensors become one parameter, prefixes come and go). Its own loading
replaces parameters; this fills them where they lie, so that views of them, and memory shared with others, stay right.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from weightcast.errors import LoadError
from weightcast.manifest.names import shown


@dataclass(slots=True)
class _Group:
    """Checkpoint tensors that become live tensors together: one by one, or through ``converter`` by source pattern."""

    target: str
    converter: Any = None
    names: dict[str, list[str]] = field(default_factory=dict)

    def all_names(self) -> list[str]:
        return [name for names in self.names.values() for name in names]

    def gaps(self) -> list[str]:
        """Source patterns whose numbered tensors (experts) are not exactly 0, 1, 2, ..."""
        found = []
        for pattern, names in self.names.items():
            if "*." in pattern:
                numbered = re.compile(re.escape(pattern).replace(r"\*\.", r"(\d+)\."))
                numbers = [int(match.group(1)) for name in names if (match := numbered.search(name))]
                if len(numbers) == len(names) and sorted(numbers) != list(range(len(names))):
                    found.append(pattern)
        return found


class CheckpointLoader:
    """Loads checkpoint-named tensors into the live tensors of ``model``."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._live: dict[str, torch.Tensor] = {
            name: tensor
            for name, tensor in model.state_dict(keep_vars=True).items()
            if isinstance(tensor, torch.Tensor)
        }
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        self._places: dict[str, tuple[str, str | None]] = {}

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]], *, skip_unknown: bool = False) -> None:
        """Fill live tensors in place, and cast values to the live tensors' types. Any subset of whole parameters may be given.

        Raises LoadError, before anything is written, for unknown names (unless they are skipped), for wrong shapes, and for fused
        parameters of which only some pieces are given.
        """
        given: dict[str, torch.Tensor] = {}
        for name, tensor in tensors:
            if name in given:
                raise LoadError(f"tensor {name!r} is given twice")
            given[name] = tensor
        groups, unknown = self._grouped(given)
        if unknown and not skip_unknown:
            raise LoadError(f"the model has no place for {shown(unknown)}")
        wrong = self._problems(groups, {name: tuple(tensor.shape) for name, tensor in given.items()})
        if wrong:
            raise LoadError(shown(wrong, between="; "))
        for group in groups:
            for target, value in self._converted(group, given):
                self._live[target].detach().copy_(value)

    def problems(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Return what is wrong with tensors of these shapes, one sentence each. A name without a place in the model is no problem here."""
        groups, _ = self._grouped(shapes)
        return self._problems(groups, shapes)

    def unknown(self, names: Iterable[str]) -> list[str]:
        """Return the names without a place in the model."""
        return self._grouped(names)[1]

    def checkpoint_names(self, live_names: Sequence[str]) -> list[str]:
        """What checkpoints call the pieces of live tensors."""
        forms = {name: torch.empty_like(self._live[name], device="meta") for name in live_names}
        return list(revert_weight_conversion(self._model, forms))

    def may_be_missing(self, live_name: str) -> bool:
        """Whether the model works without this tensor in a checkpoint."""
        return any(re.search(pattern, live_name) for pattern in self._model._keys_to_ignore_on_load_missing or ())

    def _grouped(self, names: Iterable[str]) -> tuple[list[_Group], list[str]]:
        """Groups in the natural order of names (experts by number), and the names without a place."""
        groups: dict[str, _Group] = {}
        unknown = []
        for name in sorted(names, key=dot_natural_key):
            target, pattern = self._place(name)
            if target not in self._live:
                if not any(
                    re.search(ignored, name) for ignored in self._model._keys_to_ignore_on_load_unexpected or ()
                ):
                    unknown.append(name)
                continue
            converter = None if pattern is None else self._by_pattern[pattern]
            # A plain name and a fused one that mean the same parameter stay apart, so that both are checked.
            key = target if converter is None else f"{target} fused"
            groups.setdefault(key, _Group(target, converter)).names.setdefault(pattern or name, []).append(name)
        return list(groups.values()), unknown

    def _place(self, name: str) -> tuple[str, str | None]:
        """The live name (the first, if there are several) and source pattern of a checkpoint tensor."""
        if name not in self._places:
            prefix = self._model.base_model_prefix
            place = rename_source_key(name, self._renamings, self._converters, prefix, self._live)
            if place[0] not in self._live and name in self._live:
                place = rename_source_key(name, [], [], prefix, self._live)
            self._places[name] = place
        return self._places[name]

    def _problems(self, groups: Iterable[_Group], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        return [problem for group in groups for problem in self._group_problems(group, shapes)]

    def _group_problems(self, group: _Group, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
        """Convert shapes alone and compare. The conversion is foreign code: whatever it raises means that pieces do not fit."""
        if group.converter is None:
            for name in group.all_names():
                if shapes[name] != tuple(self._live[group.target].shape):
                    yield f"{name} has shape {shapes[name]}, the model needs {tuple(self._live[group.target].shape)}"
            return
        forms = {name: torch.empty(shapes[name], device="meta") for name in group.all_names()}
        reason = f"numbers have gaps in {shown(group.gaps())}" if group.gaps() else ""
        if not reason:
            try:
                made = [(target, tuple(value.shape)) for target, value in self._converted(group, forms)]
                wrong = [(t, shape) for t, shape in made if shape != tuple(self._live[t].shape)]
                reason = "; ".join(
                    f"they make {t} {shape} instead of {tuple(self._live[t].shape)}" for t, shape in wrong
                )
            except Exception as error:  # noqa: BLE001
                reason = str(error)
        if reason:
            missing = [name for name in self.checkpoint_names([group.target]) if name not in shapes]
            pieces = f"pieces of {group.target} are missing: {shown(missing)}" if missing else "pieces do not fit"
            yield f"{pieces} ({reason}; given: {shown(group.all_names())})"

    def _converted(self, group: _Group, given: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Live names and the values for them, in the checkpoint's dtype."""
        if group.converter is None:
            for name in group.all_names():
                yield group.target, given[name]
            return
        converter = deepcopy(group.converter)
        for pattern, names in group.names.items():
            for name in names:
                converter.add_tensor(group.target, name, pattern, given[name])
        made = converter.convert(group.target, model=self._model, config=self._model.config)
        for target, value in made.items():
            yield target, value[0] if isinstance(value, list) else value
