"""The recorder: while it is active, loaders' operations on recording tensors are followed and live memory stays untouched.

Load-bearing: every write into live storages is suppressed, whatever its values are; it becomes a landing when the values
come unchanged from checkpoint tensors, and is noted as the loader's own write when not. Works for the calling thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from weightcast.errors import Unsupported
from weightcast.layout import Placement, Region
from weightcast.layout.memory import Memory
from weightcast.manifest.dtypes import name_of
from weightcast.record.boxes import TooManyBoxes, Walk
from weightcast.record.tensors import RecordingTensor, Untraceable, View, assembled, sources_of, spoiled

_aten = torch.ops.aten
_COPIES = {_aten.clone.default, _aten._to_copy.default, _aten.lift_fresh_copy.default}
_FILLS = {_aten.fill_.Scalar, _aten.zero_.default}
_SCALARS = {_aten._local_scalar_dense.default, _aten.equal.default, _aten.is_nonzero.default}


class Fill(NamedTuple):
    """A constant that the loader writes to a live place after its first ``num_before`` landings."""

    place: Placement
    value: float
    num_before: int


class LiveStorages:
    """Finds live memory by storage identity."""

    def __init__(self, memory: Memory) -> None:
        self._by_address: dict[int, list[tuple[int, int, int]]] = {}
        for number, flat in enumerate(memory.storages):
            if flat.numel():
                start = int(flat.storage_offset())
                span = (number, start, start + flat.numel())
                self._by_address.setdefault(flat.untyped_storage().data_ptr(), []).append(span)

    def find(self, tensor: torch.Tensor) -> tuple[int, int] | None:
        """Storage number of a live view and its byte offset in it; None for a tensor that is not live."""
        if isinstance(tensor, RecordingTensor) or tensor.device.type == "meta" or not tensor.numel():
            return None
        first = int(tensor.storage_offset()) * tensor.itemsize
        for number, start, end in self._by_address.get(tensor.untyped_storage().data_ptr(), ()):
            if start <= first < end:
                return number, first - start
        return None


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows one run of a loader; the results are in ``landings``, ``loader_writes``, ``reasons`` and ``foreign``."""

    def __init__(self, memory: Memory) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.landings: list[Placement] = []
        self.reasons: dict[str, str] = {}
        """Why a checkpoint tensor has no direct landing."""
        self.loader_writes: list[Placement] = []
        """Live places that the loader fills with values it computed itself (region: a box of the place)."""
        self.foreign: list[str] = []
        """Suppressed live writes of values that come from no checkpoint tensor."""
        self.fills: list[Fill] = []
        """Suppressed fills of live memory (padding) with a constant."""
        self._live = LiveStorages(memory)
        self._replacing = _ReplacingData(self)

    def __enter__(self) -> Recorder:
        super().__enter__()  # type: ignore[no-untyped-call]
        self._replacing.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._replacing.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]

    def spoil(self, names: set[str], reason: str) -> None:
        """Note that checkpoint tensors go through the loader; the first reason is kept."""
        for name in names:
            self.reasons.setdefault(name, reason)

    def keeps_place(self, target: torch.Tensor, source: torch.Tensor) -> bool:
        """Whether ``target.data = source`` must not happen; notes it."""
        names = source.base.names if isinstance(source, RecordingTensor) else set()
        place = self._live.find(target)
        if names:
            self.spoil(names, "replaces a parameter's storage instead of filling it")
        if place is not None:
            self._note_write(target, place, "its storage is replaced", names)
        return bool(names) or place is not None

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            if func is _aten.copy_.default:
                return self._copy(args[0], args[1])
            if func is _aten._foreach_copy_.default:
                for target, source in zip(args[0], args[1], strict=True):
                    self._copy(target, source)
                return None
            recorded = _recorded((*args, *kwargs.values()))
            if func._schema.is_mutable:
                return self._mutate(func, args, kwargs, recorded)
            if not recorded:
                return func(*args, **kwargs)
            return self._follow(func, args, kwargs, recorded)

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        place = self._live.find(target)
        if isinstance(target, RecordingTensor):
            self._overwrite(target, [source] if isinstance(source, RecordingTensor) else [], "copy_")
        elif not isinstance(source, RecordingTensor):
            if place is None:
                _aten.copy_.default(target, source)
            else:
                self._note_write(target, place, "copy_ of values that come from no checkpoint tensor", set())
        elif place is None:
            if target.numel():
                self.spoil(
                    source.base.names, f"copied into memory that is no live parameter, shape {tuple(target.shape)}"
                )
        else:
            self._land(target, place, source)
        return target

    def _land(self, target: torch.Tensor, place: tuple[int, int], source: RecordingTensor) -> None:
        storage, offset_nbytes = place
        meta = source.meta.expand(target.shape)
        walks = [Walk(*walk) for walk in zip(target.shape, meta.stride(), target.stride(), strict=True)]
        try:
            if offset_nbytes % target.itemsize:
                raise Untraceable("the parameter is not aligned to its element size")
            found = list(sources_of(View(source.base, meta), walks, offset_nbytes // target.itemsize, target.dtype))
        except (Untraceable, TooManyBoxes) as error:
            self._note_write(target, place, str(error), source.base.names)
            return
        dtype = name_of(target.dtype)
        for spec, box in found:
            region = Region(name=spec.name, offsets=box.offsets, sizes=box.sizes)
            self.landings.append(
                Placement(region=region, dtype=dtype, storage=storage, offset=box.target, strides=box.target_strides)
            )

    def _note_write(self, target: torch.Tensor, place: tuple[int, int], reason: str, names: set[str]) -> None:
        """A live write that is no landing: by ``names`` that went in, or foreign."""
        self.spoil(names, reason)
        if not names:
            self.foreign.append(f"storage {place[0]}, byte {place[1]}, shape {tuple(target.shape)}: {reason}")
        self.loader_writes.append(_placed(target, place))

    def _fill(self, target: torch.Tensor, value: float) -> bool:
        """Note a fill of live memory with a constant; False for other memory."""
        place = self._live.find(target)
        if place is None:
            return False
        self.fills.append(Fill(_placed(target, place), value, len(self.landings)))
        return True

    def _overwrite(self, target: RecordingTensor, sources: Sequence[RecordingTensor], what: str) -> None:
        target.base.names = target.base.names.union(*(source.base.names for source in sources))
        target.base.spoiled = True
        self.spoil(target.base.names, f"{what} changes it in place")

    def _mutate(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], recorded: list[RecordingTensor]
    ) -> Any:
        """An in-place or out= operation: run it only when it touches neither live memory nor recording tensors."""
        targets = _mutated(func, args, kwargs)
        if func in _FILLS and self._fill(targets[0], 0 if len(args) < 2 else args[1]):
            return targets[0]
        names = set().union(*(tensor.base.names for tensor in recorded))
        live = False
        for target in targets:
            place = self._live.find(target)
            if isinstance(target, RecordingTensor):
                self._overwrite(target, recorded, func.__name__)
            elif place is not None:
                live = True
                self._note_write(target, place, f"written by {func.__name__}", names)
        if not live and not recorded:
            return func(*args, **kwargs)
        self.spoil(names, f"used by {func.__name__}")
        returned = len(func._schema.returns)
        return None if returned == 0 else targets[0] if returned == 1 else tuple(targets[:returned])

    def _follow(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], recorded: list[RecordingTensor]
    ) -> Any:
        if torch.is_inference_mode_enabled() and func._can_decompose():
            with self:  # inference mode hands over composite operations whole
                return func.decompose(*args, **kwargs)
        if func in _SCALARS:
            return self._stand_in(func, recorded)
        device = _device_of(kwargs, recorded)
        outputs = self._on_meta(func, args, kwargs, recorded)
        by_storage = {tensor.meta.untyped_storage()._cdata: tensor for tensor in recorded}

        def wrap(output: Any) -> Any:
            if not isinstance(output, torch.Tensor):
                return output
            source = by_storage.get(output.untyped_storage()._cdata)
            if source is not None and output.dtype == source.dtype:
                return RecordingTensor(source.base, output, device)
            pieces = _pieces(func, args, kwargs, output)
            if pieces is not None:
                return assembled(*pieces, output, device)
            names = set().union(*(tensor.base.names for tensor in recorded))
            self.spoil(names, f"used by {func.__name__}")
            return spoiled(names, output, device)

        return _mapped(wrap, outputs)

    def _stand_in(self, func: Any, recorded: list[RecordingTensor]) -> bool | int | float:
        """A number instead of a value that nobody knows; nothing computed from it reaches live memory."""
        self.spoil(set().union(*(tensor.base.names for tensor in recorded)), f"its values are read by {func.__name__}")
        dtype = recorded[0].dtype
        if dtype == torch.bool or func is not _aten._local_scalar_dense.default:
            return True
        return 1.0 if dtype.is_floating_point else 1

    def _on_meta(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], recorded: list[RecordingTensor]
    ) -> Any:
        meta_args = [_mapped(_as_meta, argument) for argument in args]
        meta_kwargs = {name: _mapped(_as_meta, argument) for name, argument in kwargs.items()}
        if meta_kwargs.get("device") is not None:
            meta_kwargs["device"] = torch.device("meta")
        if func is _aten._to_copy.default:
            meta_kwargs.pop("pin_memory", None)
        try:
            return func(*meta_args, **meta_kwargs)
        except NotImplementedError as error:
            names = sorted(set().union(*(tensor.base.names for tensor in recorded)))
            raise Unsupported(
                f"the loader's {func} on {names[0]} cannot be followed: {error}",
                hint="Load this model through its loader",
            ) from error


class _ReplacingData(TorchFunctionMode):
    """Catches ``parameter.data = tensor``, which no dispatch mode sees: it would move the live parameter elsewhere."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func == _SET_DATA and self._recorder.keeps_place(args[0], args[1]):
            return args[0]
        return func(*args, **(kwargs or {}))


# Each access makes a new wrapper: compare with ==, never with `is`.
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]


def _placed(target: torch.Tensor, place: tuple[int, int]) -> Placement:
    """A live view as a placement of its own indices, without a name."""
    region = Region(name="", offsets=(0,) * target.dim(), sizes=tuple(target.shape))
    offset = place[1] // target.itemsize
    return Placement(
        region=region, dtype=name_of(target.dtype), storage=place[0], offset=offset, strides=target.stride()
    )


def _recorded(values: Sequence[Any]) -> list[RecordingTensor]:
    """The recording tensors among arguments; operations nest them in lists at most once."""
    found = []
    for value in values:
        if isinstance(value, RecordingTensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [item for item in value if isinstance(item, RecordingTensor)]
    return found


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply ``function`` to a value, or to the members of a list or tuple; operations nest no deeper."""
    if isinstance(value, list | tuple):
        return type(value)(function(item) for item in value)
    return function(value)


def _as_meta(value: Any) -> Any:
    if isinstance(value, RecordingTensor):
        return value.meta
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return value


def _device_of(kwargs: Mapping[str, Any], recorded: list[RecordingTensor]) -> torch.device:
    wanted = kwargs.get("device")
    return recorded[0].device if wanted is None else torch.device(wanted)


def _pieces(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: torch.Tensor
) -> tuple[list[View], int] | None:
    """For operations that only move whole values: the views that ``output`` is made of, side by side along a dimension."""
    if func in _COPIES:
        return [args[0].of], 0
    if func not in (_aten.cat.default, _aten.stack.default):
        return None
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % max(output.dim(), 1)
    parts = list(args[0])
    if func is _aten.cat.default and any(part.dim() != output.dim() for part in parts):
        parts = [part for part in parts if part.dim() == output.dim()]  # cat ignores empty 1-D tensors
    if any(not isinstance(part, RecordingTensor) or part.dtype != output.dtype for part in parts):
        return None
    if func is _aten.stack.default:
        return [View(part.base, part.meta.unsqueeze(dim)) for part in parts], dim
    return [part.of for part in parts], dim


def _mutated(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors that an operation writes to."""
    targets: list[torch.Tensor] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        values = value if isinstance(value, list | tuple) else [value]
        targets += [item for item in values if isinstance(item, torch.Tensor)]
    return targets
