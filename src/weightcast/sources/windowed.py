"""WindowedSource: a stream as a source. Its tensors are copied into windows, which are filled, transferred and filled again.

The form of the stream decides how it is cut: tensors in the stream's order, each at a multiple of 256 bytes of its window; one larger
than a window is cut along its outer dimensions. Window ``k`` is storage ``k`` of the memory and part ``k`` of every plan. There are
as many storages as windows, and memory for ``SLOTS`` of them: storage ``k`` is slot ``k % SLOTS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from weightcast.cuda.wait import DeviceWait
from weightcast.deadline import Deadline
from weightcast.errors import InvalidInput, StateError
from weightcast.layout import Layout, Placement, Region, contiguous_strides
from weightcast.layout.memory import Memory
from weightcast.manifest import ALIGNMENT, Manifest, TensorSpec, align
from weightcast.manifest.dtypes import itemsize_of
from weightcast.plan import Copy, split
from weightcast.sources.base import Source
from weightcast.sources.filling import Filling, Piece
from weightcast.sources.module import published_dtype
from weightcast.sources.renaming import Rename, renamed
from weightcast.sources.streamed import Agreement, Expected, Form, Modes, Pass, Stream, StreamSource

SLOTS = 4
"""Windows that there is memory for: one is filled, one is read, and what is told and answered about the others travels meanwhile."""


HOST_SLOT_NBYTES = 2**22
"""For each of torch's threads, up to MOST_HOST_SLOT_NBYTES: slots in host memory are no larger, whatever a user allows. All of them stay in a
processor's cache then, so that a stream is written to memory and read out of memory as often as weights that lie still."""
MOST_HOST_SLOT_NBYTES = 2**25


class WindowedSource(Source):
    """What one rank makes of a StreamSource. With ``keeps`` False the rank reads the stream and keeps nothing of it, as ranks do that
    only take part in gathering."""

    is_copied = True
    slots = SLOTS

    def __init__(
        self,
        stream: StreamSource,
        *,
        dtype: torch.dtype | None = None,
        rename: Rename | None = None,
        keeps: bool = True,
    ) -> None:
        _check_window(stream.window_nbytes)
        self._stream, self.dtype, self._keeps = stream, dtype, keeps
        forms, self.device = stream.form()
        slot_nbytes = _slot_nbytes(stream.window_nbytes, self.device)
        self._expected = _published(forms, dtype, rename) if keeps else []
        if keeps and not forms:
            raise InvalidInput("the stream yields nothing", field="source")
        specs = [each.spec for each in self._expected]
        self.manifest = Manifest.of(specs)
        self._pieces = _cut(specs, slot_nbytes)
        self.layout, self._slots = _layout(list(self._pieces.values()))
        slots = [torch.zeros(nbytes, dtype=torch.uint8, device=self.device) for nbytes in self._slots]
        self._given: Stream | None = None
        self._modes: Modes | None = None
        self._disagreed: StateError | None = None
        self._waits: dict[torch.device, DeviceWait] = {}
        self.rebind(Memory([slots[window % SLOTS] for window in range(len(self.layout.storage_nbytes))]))

    @property
    def own_nbytes(self) -> int:
        return sum(self._slots)

    def rebind(self, memory: Memory) -> None:
        self.memory = memory
        self._filling = Filling(self.manifest, (piece for some in self._pieces.values() for piece in some), memory)

    def close(self) -> None:
        super().close()
        self._filling = Filling(self.manifest, (), self.memory)
        for wait in self._waits.values():
            wait.close()
        self._waits.clear()

    def refresh(self) -> None:
        """Do nothing: values exist only while a round reads the stream."""

    def check_form(self) -> None:
        if self._disagreed is not None:
            raise StateError(self._disagreed.message)

    # -- a round

    def filled_digest(self, window: int) -> int | None:
        return self._filling.digest(window)

    def open(self, stream: Stream | None, modes: Modes) -> None:
        if stream is not None and not isinstance(stream, Iterable):
            super().open(stream, modes)
        if stream is None and self._stream.is_given:
            raise StateError("there is no stream to read", hint="Give it to the call: publish(stream)")
        self._given, self._modes = stream, modes
        self._disagreed = None  # the next pass may be as the first one was

    def _new_pass(self) -> Pass:
        modes = self._modes or Modes()
        with modes.restored():
            stream = self._stream.new_pass() if self._given is None else self._given
        return Pass(stream, modes)

    @property
    def is_spent(self) -> bool:
        return self._given is not None

    def exhaust(self) -> None:
        """Read the stream to its end and keep nothing."""
        self._new_pass().exhaust()

    def pour(self, claim: Callable[[int], None], deadline: Deadline, *, to_the_end: bool) -> Iterator[int]:
        """Read the stream once. Yields the number of each window once the window is filled and its values are there on the device, too.

        ``claim`` is called before a window is written, and returns when nobody reads the former window in the same memory any more.
        Raises StateError for a stream that does not agree with its first pass, and whatever the iterator raises. With ``to_the_end``
        the iterator is read to its end even when the caller stops early, because other ranks gather with this rank.
        """
        reading = self._new_pass()
        try:
            yield from self._pour(reading, claim, deadline)
        finally:
            if to_the_end:
                reading.exhaust()
            else:
                reading.close()

    def _pour(self, reading: Pass, claim: Callable[[int], None], deadline: Deadline) -> Iterator[int]:
        agreement, window = Agreement(self._expected), -1
        for name, tensor in reading:
            deadline.check("reading the stream")
            with self._noting():
                due = agreement.next(name, tensor)
            self._settle(tensor, deadline)
            for piece in self._pieces[due.spec.name]:
                if piece.window != window:
                    window = piece.window
                    claim(window)
                    self._filling.begin(window)
                self._filling.write(piece, tensor, deadline)
                if piece.fills:
                    yield window
        with self._noting():
            agreement.end()

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """Note that the stream has another form than its first pass: ``connect`` takes it up."""
        try:
            yield
        except StateError as error:
            self._disagreed = error
            raise

    def _settle(self, tensor: torch.Tensor, deadline: Deadline) -> None:
        """Return when what computes the tensor is done, whatever stream it was queued on."""
        if tensor.is_cuda:
            if tensor.device not in self._waits:
                self._waits[tensor.device] = DeviceWait(tensor.device)
            self._waits[tensor.device].wait(deadline, "computing a tensor of the stream")


def _check_window(window_nbytes: object) -> None:
    least = SLOTS * ALIGNMENT
    if not isinstance(window_nbytes, int) or window_nbytes < least:
        raise InvalidInput(
            f"window_nbytes is a number of at least {least}, not {window_nbytes!r}", field="window_nbytes"
        )


def _slot_nbytes(window_nbytes: int, device: torch.device) -> int:
    slot_nbytes = window_nbytes // (SLOTS * ALIGNMENT) * ALIGNMENT
    if device.type == "cuda":
        return slot_nbytes
    return min(slot_nbytes, HOST_SLOT_NBYTES * torch.get_num_threads(), MOST_HOST_SLOT_NBYTES)


def _published(forms: Sequence[Form], dtype: torch.dtype | None, rename: Rename | None) -> list[Expected]:
    """Each tensor as it comes and as it is published; InvalidInput for a name that comes twice."""
    seen: set[str] = set()
    for form in forms:
        if form.name in seen:
            raise InvalidInput(f"the stream yields {form.name!r} twice", field="source")
        seen.add(form.name)
    names = renamed([form.name for form in forms], rename)
    return [
        Expected(form, TensorSpec(name=names[form.name], dtype=published_dtype(form.dtype, dtype), shape=form.shape))
        for form in forms
    ]


def _cut(specs: Sequence[TensorSpec], slot_nbytes: int) -> dict[str, list[Piece]]:
    """The boxes of each tensor, by name, in the order in which they are written."""
    boxes: list[tuple[TensorSpec, Placement]] = []
    window, end = 0, 0
    for spec in specs:
        for region in _regions(spec, slot_nbytes):
            nbytes = region.numel * itemsize_of(spec.dtype)
            if align(end) + nbytes > slot_nbytes:
                window, end = window + 1, 0
            start = align(end)
            strides = contiguous_strides(region.sizes)
            offset = start // itemsize_of(spec.dtype)
            boxes.append(
                (spec, Placement(region=region, dtype=spec.dtype, storage=window, offset=offset, strides=strides))
            )
            end = start + nbytes
    pieces: dict[str, list[Piece]] = {spec.name: [] for spec in specs}
    for at, (spec, placement) in enumerate(boxes):
        fills = at + 1 == len(boxes) or boxes[at + 1][1].storage != placement.storage
        pieces[spec.name].append(Piece(placement, placement.region.is_whole(spec), fills))
    return pieces


def _regions(spec: TensorSpec, most_nbytes: int) -> Iterator[Region]:
    whole, strides = Region.whole(spec), contiguous_strides(spec.shape)
    copy = Copy(
        region=whole,
        src_storage=0,
        src_dtype=spec.dtype,
        src_offset=0,
        src_strides=strides,
        dst_storage=0,
        dst_dtype=spec.dtype,
        dst_offset=0,
        dst_strides=strides,
    )
    return (part.region for part in split([copy], most_nbytes))


def _layout(pieces: Sequence[Sequence[Piece]]) -> tuple[Layout, list[int]]:
    """The holdings, and the bytes of each slot: as many as the largest of its windows has."""
    placements = tuple(piece.placement for some in pieces for piece in some)
    windows = 1 + max((placement.storage for placement in placements), default=-1)
    ends = [0] * windows
    for placement in placements:
        ends[placement.storage] = max(ends[placement.storage], align(placement.end_nbytes))
    slots = [max(ends[slot::SLOTS]) for slot in range(min(SLOTS, windows))]
    sizes = tuple(slots[window % SLOTS] for window in range(windows))
    return Layout(placements=placements, storage_nbytes=sizes, is_streamed=True), slots
