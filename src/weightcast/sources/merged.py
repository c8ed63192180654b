"""MergedSource: publish a module with adapters of PEFT as the base model with merged weights, and leave the module as it is.

twin       a tree of modules as merge_and_unload() would return it: modules without adapters are the user's own, base layers of
           adapters have parameters of ours, and what lies between a root and these is made anew
inner      any source of a module, of the twin
a round    base weights are copied into our parameters, and each adapter is merged into them (see adapters)
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from weightcast.errors import StateError
from weightcast.layout.memory import Memory
from weightcast.sources.absent import refuse_absent
from weightcast.sources.adapters import bare, base_of, has_adapters, inside, is_adapter, is_chooser, merge, targets_of
from weightcast.sources.base import Source, wait_for_stream
from weightcast.sources.tree import AGAIN_HINT, Entries, moved_error
from weightcast.sources.wrappers import unwrapped


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
        self._given = given
        self._entries = Entries(given)
        self._places = list(_places(given))
        self._choosers = [part for part in given.modules() if is_chooser(part)]
        self._choices = self._current_choices()
        self._own: dict[int, nn.Parameter] = {}
        """Our parameters, by the id of the user's."""
        self._theirs: list[nn.Parameter] = []
        for place in self._places:
            for value in place.targets.values():
                self._note(value)
        self._kinds = self._current_kinds()
        self.nbytes = sum(value.numel() * value.element_size() for value in self._own.values())
        self.module = self._made(given, "", {})

    def _note(self, value: nn.Parameter) -> None:
        if id(value) not in self._own:
            empty = torch.empty(value.shape, dtype=value.dtype, device=value.device)
            self._own[id(value)] = nn.Parameter(empty, requires_grad=False)
            self._theirs.append(value)

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
                known[id(module)] = alike = bare(module)
                # Where the user's own dict stays, what is put there is seen here.
                alike.__dict__["_parameters"] = ours if is_ours else module._parameters
                alike.__dict__["_buffers"] = module._buffers
                alike.__dict__["_modules"] = parts
        return known[id(module)]

    def _current_choices(self) -> list[nn.Module]:
        return [inside(part, "") for part in self._choosers]

    def _current_kinds(self) -> list[tuple[torch.dtype, torch.Size, torch.device]]:
        return [(value.dtype, value.shape, value.device) for value in self._theirs]

    def check(self) -> None:
        """Raise StateError that names a module in whose place another one computes now. Other adapters in the same places, and other
        active ones, are no change."""
        if (kinds := self._current_kinds()) != self._kinds:
            changed = {id(v) for v, now, then in zip(self._theirs, kinds, self._kinds, strict=True) if now != then}
            raise moved_error(
                [_join(p.name, key) for p in self._places for key, v in p.targets.items() if id(v) in changed]
            )
        if self._entries.are_as_remembered() and all(map(operator.is_, self._current_choices(), self._choices)):
            return
        for then, now in _pairs(self._places, list(_places(self._given))):
            if now is None or then is None or now.name != then.name or now.module is not then.module:
                name = (then or now).name  # type: ignore[union-attr]
                raise StateError(f"another module computes at {name!r} than at connect()", hint=AGAIN_HINT)
            if (now.adapter is None) != (then.adapter is None):
                what = "came to" if then.adapter is None else "is gone from"
                raise StateError(f"an adapter {what} {then.name!r} since connect()", hint=AGAIN_HINT)
            for key, value in now.targets.items():
                if then.targets.get(key) is not value:
                    raise StateError(f"{_join(then.name, key)!r} was replaced since connect()", hint=AGAIN_HINT)
        self._places = list(_places(self._given))
        self._choosers = [part for part in self._given.modules() if is_chooser(part)]
        self._choices = self._current_choices()
        self._entries = Entries(self._given)

    @torch.no_grad()
    def merge(self) -> None:
        """Have our parameters hold what the adapters compute with now."""
        if self._own:
            torch._foreach_copy_(tuple(self._own.values()), tuple(self._theirs))
        for place in self._places:
            if place.adapter is not None:
                weights = {key: self._own[id(value)].detach() for key, value in place.targets.items()}
                merge(place.adapter, place.name, weights)


class MergedSource(Source):
    """Publishes what an inner source makes of a twin, whose parameters are merged at the start of each round."""

    is_copied = True

    def __init__(self, twin: Twin, inner: Source) -> None:
        self._twin, self._inner = twin, inner
        self.manifest, self.device, self.dtype = inner.manifest, inner.device, inner.dtype
        self._follow()

    def _follow(self) -> None:
        self.layout, self.memory = self._inner.layout, self._inner.memory

    @property
    def own_nbytes(self) -> int:
        return self._twin.nbytes + self._inner.own_nbytes

    def consolidate(self) -> None:
        self.check_form()  # parameters that were replaced would be moved in place of those that are there
        self._inner.consolidate()
        self._follow()

    def rebind(self, memory: Memory) -> None:
        self._inner.rebind(memory)
        self._follow()

    def refresh(self) -> None:
        self.fill()
        self.check()

    def fill(self) -> None:
        self._twin.check()
        self._twin.merge()
        self._inner.fill()
        wait_for_stream(self.device)

    def check(self) -> None:
        self._twin.check()
        self._inner.check()

    def check_form(self) -> None:
        self._twin.check()
        self._inner.check_form()

    def close(self) -> None:
        self._inner.close()
        super().close()


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
        yield _Place(name, base, adapter, {} if adapter is None else targets_of(adapter, name))
        for key, part in base._modules.items():
            if part is not None:
                yield from walk(part, _join(name, key))

    yield from walk(module, "")


def _pairs(then: list[_Place], now: list[_Place]) -> Iterator[tuple[_Place | None, _Place | None]]:
    for at in range(max(len(then), len(now))):
        yield then[at] if at < len(then) else None, now[at] if at < len(now) else None


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
