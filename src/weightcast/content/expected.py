"""Expected digests: what each worker's bytes must add up to, computed from the source in every round."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import msgspec
import torch

from weightcast.content.finite import non_finite
from weightcast.content.layout_digest import LayoutDigest
from weightcast.cuda.wait import new_event
from weightcast.digest.formula import combine
from weightcast.layout import Layout, Placement, Region, contiguous_strides
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest, align
from weightcast.manifest.dtypes import itemsize_of
from weightcast.plan import Copy, nbytes_of, parts_of, split
from weightcast.plan.replay import Boxes

QUEUED = 2
"""Windows whose digests a GPU may still be computing. A window's memory is filled again after so many others and one more."""
SCRATCH_NBYTES = 2**28
"""Values that are cast on their way are cast here, too, so many bytes at a time."""


class _Begun(NamedTuple):
    """A digest of a memory's values that is queued on a GPU: the call that waits for it, and when it is done."""

    memory: int
    wait: Callable[[], int]
    done: torch.cuda.Event
    is_stale: bool = False


class ExpectedDigest:
    """The digest of the source's values in the regions and dtypes of some copies."""

    def __init__(self, manifest: Manifest, copies: Sequence[Copy], memory: Memory, *, part_of_nbytes: int = 0) -> None:
        """``part_of_nbytes``: this is a window of a stream of so many bytes. What casts need beside the values is allocated for each
        use then, and otherwise once."""
        self._copies = copies
        held = tuple(_source_side(copy) for copy in copies if copy.is_plain)
        layout = Layout(placements=held, storage_nbytes=memory.sizes)
        self._plain = LayoutDigest(manifest, layout, gaps_are_zero=memory.is_arena, part_of_nbytes=part_of_nbytes)
        casts = [copy for copy in copies if copy.nbytes and not copy.is_plain]
        self._casts = _Casts(manifest, casts, part_of_nbytes=part_of_nbytes)

        # Here, when a Publisher connects, and not in its first round.
        self._plain.warm_up(memory)
        self._casts.warm_up(memory)
        self._begun: _Begun | None = None

    def of(self, memory: Memory, check: Callable[[], None] = lambda: None) -> int:
        """The digest, unsigned; on a GPU this waits for the result. On a CPU ``check`` is called every few milliseconds and may
        raise."""
        return self.start(memory, check)()

    def non_finite(self, memory: Memory, check: Callable[[], None] = lambda: None) -> dict[str, int]:
        """How many of the values are NaN or infinite, by tensor; a pass of its own (see finite)."""
        return non_finite(self._copies, memory, check)

    def start(self, memory: Memory, check: Callable[[], None] = lambda: None) -> Callable[[], int]:
        """``of`` in two steps: on a GPU the work is queued on the current stream, and the call that is returned, made once,
        waits for it; on a CPU that call does all of it. What ``begin`` has queued is used, once."""
        if not _is_on_gpu(memory):
            return lambda: combine([self._plain.of(memory, check), self._casts.start(memory, check)()])
        begun, self._begun = self._begun, None
        if begun is not None:
            # Also for a stale one: both write their sums to the same place.
            torch.cuda.current_stream(memory.storages[0].device).wait_event(begun.done)
            if begun.memory == memory.number and not begun.is_stale:
                return begun.wait
        plain, casts = self._plain.start(memory), self._casts.start(memory, check)
        return lambda: combine([plain(), casts()])

    def begin(self, memory: Memory) -> None:
        """Queue on the current stream what the next ``start`` would have to; nothing on a CPU."""
        self.forget()
        if _is_on_gpu(memory):
            wait, done = self.start(memory), new_event()
            done.record(torch.cuda.current_stream(memory.storages[0].device))
            self._begun = _Begun(memory.number, wait, done)

    def take(self, window: int, memory: Memory, check: Callable[[], None], known: int | None = None) -> None:
        """A window of a stream is filled: digest it before others take its place. Nothing where values lie still. ``known`` is the digest
        of all that is in the window, where somebody has it."""

    def forget(self) -> None:
        """Use nothing of what ``begin`` has queued: values may be other ones since."""
        if self._begun is not None:
            self._begun = self._begun._replace(is_stale=True)


def _is_on_gpu(memory: Memory) -> bool:
    return any(storage.is_cuda for storage in memory.storages[:1])


class StreamedDigest(ExpectedDigest):
    """That of a stream's values, of which only a few windows exist at a time: ``start``, then ``take`` for each window."""

    def __init__(self, manifest: Manifest, copies: Sequence[Copy], memory: Memory, layout: Layout) -> None:
        """``layout``: what is in each window."""
        super().__init__(manifest, (), memory)
        self._manifest, self._nbytes = manifest, nbytes_of(copies)
        self._parts = {window: some for window, some in parts_of(copies).items() if some}
        self._whole = _whole_windows(copies, layout)
        """Windows of which everything counts, as it lies there."""
        # On a CPU somebody has digested whole windows already, as a rule; there are thousands of them.
        late = frozenset[int]() if _is_on_gpu(memory) else self._whole
        self._windows = {window: self._made(window, memory) for window in self._parts if window not in late}
        self._sum = 0
        self._queued: deque[Callable[[], int]] = deque()

    def start(self, memory: Memory, check: Callable[[], None] = lambda: None) -> Callable[[], int]:
        """Forget what was taken; the call that is returned gives the sum of what is taken from here on."""
        self._sum = 0
        self._queued.clear()
        return lambda: self._settled(0)

    def take(self, window: int, memory: Memory, check: Callable[[], None], known: int | None = None) -> None:
        if known is not None and window in self._whole:
            self._sum = combine([self._sum, known])
        elif window in self._parts:
            if window not in self._windows:
                self._windows[window] = self._made(window, memory)
            self._queued.append(self._windows[window].start(memory, check))
            self._settled(QUEUED if _is_on_gpu(memory) else 0)

    def _made(self, window: int, memory: Memory) -> ExpectedDigest:
        return ExpectedDigest(self._manifest, self._parts[window], memory, part_of_nbytes=self._nbytes)

    def _settled(self, most: int) -> int:
        """The sum of what was taken, but for so many windows whose digests are queued."""
        while len(self._queued) > most:
            self._sum = combine([self._sum, self._queued.popleft()()])
        return self._sum


def _whole_windows(copies: Sequence[Copy], layout: Layout) -> set[int]:
    """The windows each of whose placements is one copy's source, without a cast."""
    held: dict[int, list[Region]] = {}
    for placement in layout.placements:
        held.setdefault(placement.storage, []).append(placement.region)
    wanted = {window: [copy.region for copy in some if copy.is_plain] for window, some in parts_of(copies).items()}
    return {
        window
        for window, regions in held.items()
        if len(wanted.get(window, ())) == len(regions) and set(wanted[window]) == set(regions)
    }


def expected_digest(
    manifest: Manifest, copies: Sequence[Copy], memory: Memory, windows: Layout | None = None
) -> ExpectedDigest:
    """The digest of some copies' values, which lie still, or pass by in ``windows``."""
    if windows is None:
        return ExpectedDigest(manifest, copies, memory)
    return StreamedDigest(manifest, copies, memory, windows)


class _Casts:
    """Copies that cast, in batches that fit a scratch storage."""

    def __init__(self, manifest: Manifest, copies: Sequence[Copy], *, part_of_nbytes: int = 0) -> None:
        self._keeps_scratch = not part_of_nbytes
        self._batches = list(_batches(copies))
        self._nbytes = max((end for _, end in self._batches), default=0)
        self._digests = [
            LayoutDigest(
                manifest,
                Layout(placements=tuple(map(_scratch_side, batch)), storage_nbytes=(end,)),
                part_of_nbytes=part_of_nbytes,
            )
            for batch, end in self._batches
        ]
        self._compiled: tuple[int, Memory, list[Boxes]] | None = None

    @torch.no_grad()
    def start(self, memory: Memory, check: Callable[[], None]) -> Callable[[], int]:
        """Batches share the scratch storage: on a CPU each is digested before the next one is cast, on a GPU the stream keeps
        that order."""
        if not self._batches:
            return int
        scratch, casts = self._compiled_for(memory)
        waits: list[Callable[[], int]] = []
        for cast, digest in zip(casts, self._digests, strict=True):
            if scratch.storages[0].is_cuda:
                cast.run()
                waits.append(digest.start(scratch))
            else:
                check()
                cast.run()
                waits.append(partial(int, digest.of(scratch, check)))
        if not self._keeps_scratch:
            self._compiled = None
            for digest in self._digests:
                digest.forget()
        return lambda: combine(wait() for wait in waits)

    def warm_up(self, memory: Memory) -> None:
        """Do now what the first ``start`` would do beside computing."""
        if self._batches and self._keeps_scratch:
            scratch, _ = self._compiled_for(memory)
            for digest in self._digests:
                digest.warm_up(scratch)

    def _compiled_for(self, memory: Memory) -> tuple[Memory, list[Boxes]]:
        if self._compiled is None or self._compiled[0] != memory.number:
            self._compiled = (memory.number, *self._compile(memory))
        return self._compiled[1:]

    @torch.inference_mode(False)
    def _compile(self, memory: Memory) -> tuple[Memory, list[Boxes]]:
        device = memory.storages[0].device
        scratch = Memory([torch.zeros(self._nbytes, dtype=torch.uint8, device=device)])
        return scratch, [Boxes(batch, memory, scratch) for batch, _ in self._batches]


def _batches(copies: Sequence[Copy]) -> Iterator[tuple[list[Copy], int]]:
    """The copies with places in the scratch storage as their destinations, and the bytes that a batch needs."""
    batch: list[Copy] = []
    end = 0
    for copy in split(copies, SCRATCH_NBYTES):
        if batch and end + copy.nbytes > SCRATCH_NBYTES:
            yield batch, end
            batch, end = [], 0
        offset, strides = end // itemsize_of(copy.dst_dtype), contiguous_strides(copy.sizes)
        batch.append(msgspec.structs.replace(copy, dst_storage=0, dst_offset=offset, dst_strides=strides))
        end = align(end + copy.nbytes)
    if batch:
        yield batch, end


def _scratch_side(copy: Copy) -> Placement:
    return Placement(
        region=copy.region, dtype=copy.dst_dtype, storage=0, offset=copy.dst_offset, strides=copy.dst_strides
    )


def _source_side(copy: Copy) -> Placement:
    return Placement(
        region=copy.region,
        dtype=copy.src_dtype,
        storage=copy.src_storage,
        offset=copy.src_offset,
        strides=copy.src_strides,
    )
