"""The digest of what lies in a memory, compiled from a layout once: by kernels of the device where the bytes lie."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from weightcast.digest import formula
from weightcast.digest.formula import digest_by
from weightcast.digest.regions import DigestRun, box_of, joined, run_of
from weightcast.layout import Layout, Placement
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest

if TYPE_CHECKING:
    from weightcast.cpu.digest import CpuDigest
    from weightcast.cuda.digest import RunDigest


def digest_bytes(data: torch.Tensor, position: int) -> int:
    """Digest of contiguous bytes (1-D uint8 tensor, any device) whose first lies at byte ``position`` of the image."""
    if data.is_cuda:
        from weightcast.cuda.digest import digest_words

        return digest_by(digest_words, data, position)
    return digest_by(formula.digest_words, data, position)


def digest_tensor(tensor: torch.Tensor, position: int = 0) -> int:
    """Digest of a whole tensor whose row-major bytes start at ``position``."""
    flat = tensor.detach().contiguous().reshape(-1)
    return digest_bytes(flat.view(torch.uint8), position)


class LayoutDigest:
    """The digest of what lies in a memory, compiled from a layout once.

    Runs that continue in memory and in the image are joined; ``gaps_are_zero`` also joins over the padding behind
    the whole tensors of an arena. Placements whose dtype is not the manifest's are counted at the positions of their own element size.
    """

    def __init__(
        self, manifest: Manifest, layout: Layout, *, gaps_are_zero: bool = False, part_of_nbytes: int = 0
    ) -> None:
        """``part_of_nbytes``: bytes of all that is digested by turns with this, as the windows of a stream are."""
        self._part_of_nbytes = part_of_nbytes
        self._manifest = manifest
        self._strided: list[Placement] = []
        runs: list[DigestRun] = []
        for placement in layout.placements:
            if placement.region.numel == 0:
                continue
            run = run_of(placement, manifest)
            if run is None:
                self._strided.append(placement)
            else:
                runs.append(run)
        self.runs = joined(runs, across_padding=gaps_are_zero)
        self._compiled: dict[int, CpuDigest | RunDigest] = {}
        self._compiling = threading.Lock()

    def of(self, memory: Memory, check: Callable[[], None] = lambda: None) -> int:
        """The digest, an unsigned 64-bit number; on a GPU this waits for the result. On a CPU ``check`` is called every few
        milliseconds and may raise."""
        return self.start(memory, check)()

    def start(self, memory: Memory, check: Callable[[], None] = lambda: None) -> Callable[[], int]:
        """``of`` in two steps: on a GPU the work is queued on the current stream, and the call that is returned, made once,
        waits for it; on a CPU that call does all of it. ``memory`` must keep its values until then."""
        from weightcast.cpu.digest import CpuDigest

        compiled = self._compiled_for(memory)
        return partial(compiled.total, check) if isinstance(compiled, CpuDigest) else compiled.start()

    def warm_up(self, memory: Memory) -> None:
        """Do now what the first ``of`` of a memory would do beside computing: tables are built, kernels compiled and loaded. On a
        GPU some of it is queued on the current stream. May be called beside ``of``, on another thread."""
        self._compiled_for(memory).warm_up()

    def forget(self) -> None:
        """Let go of all memories that were digested; the next ``of`` compiles anew."""
        with self._compiling:
            self._compiled.clear()

    def _compiled_for(self, memory: Memory) -> CpuDigest | RunDigest:
        with self._compiling:
            compiled = self._compiled.get(memory.number)
            if compiled is None:
                compiled = self._compile(memory)
                # Live parameters and their shadow take turns, so a few are kept.
                while len(self._compiled) >= 4:
                    del self._compiled[next(iter(self._compiled))]
                self._compiled[memory.number] = compiled
        return compiled

    def _compile(self, memory: Memory) -> CpuDigest | RunDigest:
        from weightcast.cpu.digest import CpuDigest

        boxes = [box_of(placement, self._manifest) for placement in self._strided]
        if memory.gpu is None and not memory.is_cuda:
            return CpuDigest(self.runs, boxes, memory, self._part_of_nbytes)
        from weightcast.cuda.digest import RunDigest

        return RunDigest(self.runs, memory.storages, boxes, memory.gpu)
