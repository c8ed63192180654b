"""MergedSource: publish a module with adapters of PEFT as the base model with merged weights, and leave the module as it is.

twin       a tree of modules as merge_and_unload() would return it: modules without adapters are the user's own, base layers of
           adapters have parameters of ours, and what lies between a root and these is made anew
inner      any source of a module, of the twin
    a round    base weights are copied into our parameters, and each adapter is merged into them (see adapters); where adapted layers are
               sharded, all ranks gather what merging needs (see gathered)
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from weightcast.deadline import Deadline
from weightcast.errors import StateError
from weightcast.layout import contiguous_strides
from weightcast.sources.absent import refuse_absent
from weightcast.sources.adapters import (
    bare,
    base_of,
    has_adapters,
    inside,
    is_adapter,
    is_chooser,
    is_elementwise,
    merge,
    said_of,
    targets_of,
)
from weightcast.sources.base import Source, wait_for_stream
from weightcast.sources.gathered import check_together, whole_of
from weightcast.sources.outer import OuterSource
from weightcast.sources.quantised import dequantised, is_quantised, refuse_unknown
from weightcast.sources.shards import is_distributed, local_of, part_of
from weightcast.sources.tree import AGAIN_HINT, Entries, moved_error
from weightcast.sources.wrappers import unwrapped

GATHER_S = 60.0
"""How long ranks wait for each other where no call's deadline is known."""


class _Place(NamedTuple):
    """A place in the merged model: the user's module that computes there, the adapter around it, and the parameters that it changes."""

    name: str
    module: nn.Module
    adapter: nn.Module | None
    targets: dict[str, nn.Parameter]


class Twin:
    """The merged form of a module, whose parameters are the user's where no adapter changes them."""

    def __init__(self, given: nn.Module) -> None:
        refuse_absent(dict(given.named_parameters()))
        if any(kind.__name__ == "FSDPModule" for part in given.modules() for kind in type(part).__mro__):
            given.state_dict()  # shards are in their places then, and not what was gathered of them
        self._given = given
        self._entries = Entries(given)
        self._shards = _shards(given)
        self._places = self._current_places()
        self._choosers = [part for part in given.modules() if is_chooser(part)]
        self._choices = self._current_choices()
        self._own: dict[int, nn.Parameter] = {}
        """Our parameters, by the id of the user's."""
        self._theirs: list[nn.Parameter] = []
        self._packed: dict[int, nn.Module] = {}
        """Layers whose weights are quantised, by the ids of these."""
        for place in self._places:
            for key, value in place.targets.items():
                self._note(place.module, key, value)
        self._kinds = self._current_kinds()
        self.nbytes = sum(local_of(value).numel() * value.element_size() for value in self._own.values())
        self.module = self._made(given, "", {})

    def _note(self, module: nn.Module, key: str, value: nn.Parameter) -> None:
        if id(value) not in self._own:
            is_packed = key == "weight" and is_quantised(module)
            empty = torch.empty_like(dequantised(module)) if is_packed else _empty_like(value)
            self._own[id(value)] = nn.Parameter(empty, requires_grad=False)
            self._theirs.append(value)
            if is_packed:
                self._packed[id(value)] = module

    def _made(self, module: nn.Module, name: str, known: dict[int, nn.Module]) -> nn.Module:
        """What stands in the twin for a module of the user's; the module itself where nothing inside of it differs."""
        module = inside(module, name)
        module = base_of(module) if is_adapter(module) else module
        if id(module) not in known:
            parts = {
                key: part if part is None else self._made(part, _join(name, key), known)
                for key, part in module._modules.items()
            }
            ours = {key: self._own.get(id(value), value) for key, value in module._parameters.items()}
            known[id(module)] = module
            is_ours = any(ours[key] is not value for key, value in module._parameters.items())
            if is_ours or any(parts[key] is not part for key, part in module._modules.items()):
                known[id(module)] = alike = bare(module, nn.Linear if is_quantised(module) else None)
                # Where the user's own dict stays, what is put there is seen here.
                alike.__dict__["_parameters"] = ours if is_ours else module._parameters
                alike.__dict__["_buffers"] = module._buffers
                alike.__dict__["_modules"] = parts
        return known[id(module)]

    def _current_choices(self) -> list[nn.Module]:
        return [inside(part, "") for part in self._choosers]

    @property
    def shard(self) -> torch.Tensor | None:
        """Any of the shards that merging gathers, where ranks merge together."""
        return next(filter(is_distributed, self._theirs), None)

    def said(self) -> bytes:
        """What ranks that merge together have to agree in."""
        told = [(p.name, said_of(p.adapter)) for p in self._places if p.adapter is not None]
        return repr(told).encode()

    def _current_places(self) -> list[_Place]:
        """The places, with shards where FSDP has put what was gathered of them for as long as it computes."""
        return [
            place._replace(targets={key: self._shard(place.module, key, value) for key, value in place.targets.items()})
            for place in _places(self._given)
        ]

    def _shard(self, module: nn.Module, key: str, value: nn.Parameter) -> nn.Parameter:
        return value if is_distributed(value) else self._shards.get((id(module), key), value)

    def lies_where_it_did(self) -> bool:
        """Whether base weights are on the device where ours are."""
        return bool(self._own) and self._current_kinds() == self._kinds

    @torch.no_grad()
    def close(self) -> None:
        """Free our parameters' memory."""
        for value in self._own.values():
            local_of(value).set_()  # type: ignore[call-overload]
        self._own.clear()

    def _current_kinds(self) -> list[tuple[torch.device, torch.dtype, torch.Size | None]]:
        # bitsandbytes packs a weight anew for the processor that first computes with the weight.
        return [(v.device, v.dtype, None if id(v) in self._packed else v.shape) for v in self._theirs]

    def check(self) -> None:
        """Raise StateError that names a module in whose place another one computes now. Other adapters in the same places, and other
        active ones, are no change."""
        if (kinds := self._current_kinds()) != self._kinds:
            keeps_form = [kind[1:] for kind in kinds] == [kind[1:] for kind in self._kinds]
            changed = {id(v) for v, now, then in zip(self._theirs, kinds, self._kinds, strict=True) if now != then}
            raise moved_error(
                [_join(p.name, key) for p in self._places for key, v in p.targets.items() if id(v) in changed],
                keeps_form=keeps_form,
            )
        if self._entries.are_as_remembered() and all(map(operator.is_, self._current_choices(), self._choices)):
            return
        self._shards |= _shards(self._given)
        places = self._current_places()
        for then, now in _pairs(self._places, places):
            if now is None or then is None or now.name != then.name or now.module is not then.module:
                name = (then or now).name  # type: ignore[union-attr]
                raise StateError(f"another module computes at {name!r} than at connect()", hint=AGAIN_HINT)
            if (now.adapter is None) != (then.adapter is None):
                what = "came to" if then.adapter is None else "is gone from"
                raise StateError(f"an adapter {what} {then.name!r} since connect()", hint=AGAIN_HINT)
            for key, value in now.targets.items():
                if then.targets.get(key) is not value:
                    raise StateError(f"{_join(then.name, key)!r} was replaced since connect()", hint=AGAIN_HINT)
        self._places = places
        self._choosers = [part for part in self._given.modules() if is_chooser(part)]
        self._choices = self._current_choices()
        self._entries = Entries(self._given)

    @torch.no_grad()
    def merge(self, deadline: Deadline) -> None:
        """Have our parameters hold what the adapters compute with now. Collective where there is a ``shard``."""
        plain = [value for value in self._theirs if id(value) not in self._packed]
        if plain:
            ours = tuple(local_of(self._own[id(value)]) for value in plain)
            torch._foreach_copy_(ours, tuple(map(local_of, plain)))
        for number, module in self._packed.items():
            self._own[number].copy_(dequantised(module))

        device = next((value.device.type for value in self._theirs), "cpu")
        with torch.autocast(device, enabled=False):
            for place in self._places:
                if place.adapter is not None:
                    self._merge_into(place, place.adapter, deadline)

    def _merge_into(self, place: _Place, adapter: nn.Module, deadline: Deadline) -> None:
        """Merge one adapter into the base weights that our parameters hold."""

        def seen(module: nn.Module, key: str, value: nn.Parameter) -> nn.Parameter:
            value = self._shard(module, key, value)
            return nn.Parameter(whole_of(value, deadline), requires_grad=False) if is_distributed(value) else value

        held = {key: self._own[id(value)].detach() for key, value in place.targets.items()}
        weights = {key: _whole(value, adapter, deadline) for key, value in held.items()}
        merge(adapter, place.name, weights, seen)
        for key, value in held.items():
            if is_distributed(value):
                local_of(value).copy_(_box(value, weights[key]))


class MergedSource(OuterSource):
    """Publishes what an inner source makes of a twin, whose parameters are merged at the start of each round."""

    is_copied = True

    def __init__(self, twin: Twin, inner: Source) -> None:
        self._twin = twin
        super().__init__(inner)

    @property
    def own_nbytes(self) -> int:
        return self._twin.nbytes + self._inner.own_nbytes

    def consolidate(self) -> None:
        self.check_form()  # parameters that were replaced would be moved in place of those that are there
        super().consolidate()

    def refresh(self) -> None:
        self.fill()
        self.check()

    def fill(self) -> None:
        self.gather()
        wait_for_stream(self.device)

    def gather(self) -> None:
        deadline = self.deadline or Deadline(GATHER_S)
        check_together(self._twin.shard, self._said_now, deadline)
        self._twin.merge(deadline)
        self._inner.gather()
        wait_for_stream(self.device)

    def _said_now(self) -> bytes:
        self._twin.check()
        return self._twin.said()

    def check(self) -> None:
        self._twin.check()
        super().check()

    def check_form(self) -> None:
        self._twin.check()
        self._inner.check_form()

    def follow(self) -> bool:
        return self._twin.lies_where_it_did() and super().follow()

    def close(self) -> None:
        super().close()
        self._twin.close()


def _shards(module: nn.Module) -> dict[tuple[int, str], nn.Parameter]:
    """DTensors by the module that has them, and their names there."""
    return {
        (id(part), key): value
        for part in module.modules()
        for key, value in part._parameters.items()
        if value is not None and is_distributed(value)
    }


def _empty_like(value: torch.Tensor) -> torch.Tensor:
    """Memory for a tensor, or for this rank's part of one."""
    if not is_distributed(value):
        return torch.empty(value.shape, dtype=value.dtype, device=value.device)
    from torch.distributed.tensor import DTensor

    local, given = local_of(value), cast("DTensor", value)
    empty = torch.empty(local.shape, dtype=local.dtype, device=local.device)
    strides = contiguous_strides(tuple(value.shape))
    return DTensor.from_local(
        empty, given.device_mesh, given.placements, run_check=False, shape=value.shape, stride=strides
    )


def _whole(value: torch.Tensor, adapter: nn.Module, deadline: Deadline) -> torch.Tensor:
    """A base weight as merging needs it: values of other ranks are gathered where the merged ones depend on them."""
    if not is_distributed(value):
        return value
    if not is_elementwise(adapter):
        return whole_of(value, deadline)
    local = local_of(value)
    whole = torch.zeros(value.shape, dtype=value.dtype, device=local.device)
    _box(value, whole).copy_(local)
    return whole


def _box(value: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Where this rank's part of a tensor lies in the whole."""
    part = part_of("", value)
    for dim, (start, size) in enumerate(zip(part.offsets, part.values.shape, strict=True)):
        whole = whole.narrow(dim, min(start, whole.shape[dim]), size)
    return whole


def merged_twin(module: nn.Module) -> Twin | None:
    """The merged form of a module; None where PEFT has changed nothing of it."""
    module = unwrapped(module)
    return Twin(module) if has_adapters(module) else None


def _places(module: nn.Module) -> Iterator[_Place]:
    """All places of the merged model, in the order in which ``merge_and_unload`` comes to them."""
    seen: set[int] = set()

    def walk(module: nn.Module, name: str) -> Iterator[_Place]:
        found = inside(module, name)
        adapter = found if is_adapter(found) else None
        base = found if adapter is None else base_of(found)
        if id(base) in seen:
            return
        seen.add(id(base))
        yield _Place(name, base, adapter, _targets(base, adapter, name))
        for key, part in base._modules.items():
            if part is not None:
                yield from walk(part, _join(name, key))

    yield from walk(module, "")


def _targets(base: Any, adapter: nn.Module | None, name: str) -> dict[str, nn.Parameter]:
    """The parameters of a place that are published from memory of ours."""
    if adapter is not None:
        return targets_of(adapter, name)
    if is_quantised(base):
        refuse_unknown(base, name)
        return {"weight": base.weight}
    return {}


def _pairs(then: list[_Place], now: list[_Place]) -> Iterator[tuple[_Place | None, _Place | None]]:
    for at in range(max(len(then), len(now))):
        yield then[at] if at < len(then) else None, now[at] if at < len(now) else None


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
