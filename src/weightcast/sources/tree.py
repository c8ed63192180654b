"""Tree: whether a module still is what it was at connect, by the names and the places of its tensors."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, compress, repeat
from typing import Any

import torch
from torch import nn

from weightcast.errors import StateError, WeightsMoved
from weightcast.sources.parts import Whole
from weightcast.sources.shards import is_distributed, local_of

AGAIN_HINT = "Call connect() to publish the module as it is now"
_NAMED = 3
"""So many names are enough for a message."""
_dtype = operator.attrgetter("dtype")


class Entries:
    """The children, parameters and buffers of a module and its parts. They are compared without a loop in Python."""

    def __init__(self, module: nn.Module) -> None:
        self._whole = module if isinstance(module, Whole) else None
        modules = list(module.modules())
        found: list[dict[str, Any]] = [
            d for module in modules for d in (module._modules, module._parameters, module._buffers)
        ]
        self._empty, self._filled = [d for d in found if not d], [d for d in found if d]
        self._sizes = list(map(len, self._filled))
        self._then = list(self._current())

    def _current(self) -> Iterator[Any]:
        return chain.from_iterable(map(dict.values, self._filled))

    def are_as_remembered(self) -> bool:
        """Whether all entries are the very objects that they were. Raises StateError where a part of a source is another one."""
        if self._whole is not None:
            self._whole.check()
        if any(self._empty) or list(map(len, self._filled)) != self._sizes:
            return False
        return all(map(operator.is_, self._current(), self._then))


class Tree:
    """Where a module keeps its children, parameters and buffers. When a layer or tensor is replaced, the published tensor stays behind
    with old values. A round waits for the check, so a module that has not changed is recognised without a loop in Python."""

    def __init__(self, module: nn.Module, values: Iterable[torch.Tensor]) -> None:
        self._module = module
        wanted = set(map(id, values))
        self._then = dict(_tensors_of(module))
        self._published = {name: value for name, value in self._then.items() if id(value) in wanted}
        self._is_all = all(id(value) in wanted or not local_of(value).numel() for value in self._then.values())
        self._entries = Entries(module)

    def names_of(self, values: Iterable[torch.Tensor]) -> list[str]:
        """Return the module's own name of each of these tensors, the first name where a tensor has several."""
        names: dict[int, str] = {}
        for name, value in self._published.items():
            names.setdefault(id(value), name)
        return [names.get(id(value), "a tensor") for value in values]

    def check(self) -> None:
        """Raise StateError that names a published tensor in whose place another tensor is now, or a tensor that the module did not have
        at connect.

        While FSDP computes, it puts gathered plain tensors in the place of shards; the shards stay what they are.
        """
        if not self._entries.are_as_remembered():
            self._name_the_change()
            self._entries = Entries(self._module)

    def _name_the_change(self) -> None:
        now = dict(_tensors_of(self._module))
        for name, held in self._published.items():
            value = now.get(name)
            if value is not held and (value is None or is_distributed(value) or not is_distributed(held)):
                if value is None:
                    raise StateError(f"{name!r} is gone from the module since connect()", hint=AGAIN_HINT)
                raise StateError(
                    f"{name!r} of the module was replaced by another tensor since connect()",
                    hint=f"Copy new values into it (with torch.no_grad(): parameter.copy_(values)). {AGAIN_HINT}",
                )
        known = set(map(id, self._then.values()))
        for name, value in now.items():
            if self._is_all and name not in self._then and id(value) not in known:
                raise StateError(f"{name!r} came into the module since connect()", hint=AGAIN_HINT)


class Places:
    """Where tensors lie and in what form. Each property is read by one ``map``, and strides are read of tensors that are not contiguous
    only."""

    def __init__(self, values: Callable[[], Sequence[torch.Tensor]], names: Sequence[str]) -> None:
        """``values`` returns the tensors of these names, which may be other objects each time."""
        self._values, self._names = values, names
        tensors = values()
        self._strided = [not value.is_contiguous() for value in tensors]
        self._complex = [value.is_complex() for value in tensors]
        self._strided_names = list(compress(names, self._strided))
        self._then, self._strides = self._current(tensors), self._current_strides(tensors)

    def _current(self, tensors: Sequence[torch.Tensor]) -> list[list[Any]]:
        tensor = torch.Tensor
        ways = (tensor.data_ptr, _dtype, tensor.size, tensor.is_contiguous, tensor.is_neg)
        # Only complex tensors can be conjugated, and whether a tensor is complex is a matter of its type.
        conjugated = repeat(False, len(tensors)) if True not in self._complex else map(tensor.is_conj, tensors)
        return [*(list(map(way, tensors)) for way in ways), list(conjugated)]

    def _current_strides(self, tensors: Sequence[torch.Tensor]) -> list[tuple[int, ...]]:
        return list(map(torch.Tensor.stride, compress(tensors, self._strided)))

    def keep_form(self) -> bool:
        """Whether element types, sizes, strides, and what torch makes of values when it reads them are what they were. The tensors may lie
        anywhere."""
        tensors = self._values()
        return self._current(tensors)[1:] == self._then[1:] and self._current_strides(tensors) == self._strides

    def check_form(self) -> None:
        """Raise StateError that names a tensor whose form is not what it was. The tensor may lie anywhere."""
        if not self.keep_form():
            self.check()

    def have_moved(self) -> bool:
        """Whether a tensor lies elsewhere now. This is the quick half of ``check``."""
        return list(map(torch.Tensor.data_ptr, self._values())) != self._then[0]

    def follow(self) -> None:
        """Compare with what is now from here on."""
        tensors = self._values()
        self._then, self._strides = self._current(tensors), self._current_strides(tensors)

    def check(self) -> None:
        """Raise WeightsMoved that names a tensor which does not lie where it lay, or StateError where its form changed as well."""
        tensors = self._values()
        now, strides = self._current(tensors), self._current_strides(tensors)
        if now != self._then:
            pairs = zip(zip(*self._then, strict=True), zip(*now, strict=True), strict=True)
            names = [name for name, (then, value) in zip(self._names, pairs, strict=True) if then != value]
            raise moved_error(names, keeps_form=now[1:] == self._then[1:] and strides == self._strides)
        if strides != self._strides:
            turned = map(operator.ne, self._strides, strides)
            raise moved_error(list(compress(self._strided_names, turned)))


def moved_error(names: Sequence[str], *, keeps_form: bool = False) -> StateError:
    """Return the error about parameters that were moved, or changed form."""
    kind = WeightsMoved if keeps_form else StateError
    return kind(f"parameters of the module were moved since connect(): {named(names)}", hint=AGAIN_HINT)


def named(names: Sequence[str]) -> str:
    """Return the first few names, and how many names there are beside these."""
    told = ", ".join(map(repr, names[:_NAMED]))
    return f"{told} and {len(names) - _NAMED} more" if len(names) > _NAMED else told


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values of parameters and persistent buffers; a tensor of several names comes with each."""
    for prefix, child in module.named_modules(remove_duplicate=False):
        transient = child._non_persistent_buffers_set
        for key, value in chain(child._parameters.items(), child._buffers.items()):
            if value is not None and key not in transient:
                yield f"{prefix}.{key}".lstrip("."), value
