"""Footprint: what a process holds of the machine, as the kernel sees it. Linux."""

from __future__ import annotations

import gc
import os
from dataclasses import astuple, dataclass


@dataclass(frozen=True, slots=True)
class Footprint:
    """Counts and bytes of one process at one moment; ``segments`` are mappings of shared memory that weightcast made."""

    descriptors: int
    threads: int
    segments: int
    resident_nbytes: int

    @classmethod
    def now(cls) -> Footprint:
        """This process, after garbage was collected."""
        gc.collect()
        with open("/proc/self/maps") as maps:
            segments = sum("memfd:weightcast" in line for line in maps)
        with open("/proc/self/status") as status:
            fields = dict(line.split(":", 1) for line in status)
        # Without pages of files: those of libraries come in when their code first runs.
        resident_nbytes = 1024 * sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem"))
        # The folder's own descriptor, open while it is listed, does not count.
        return cls(
            len(os.listdir("/proc/self/fd")) - 1,
            len(os.listdir("/proc/self/task")),
            segments,
            resident_nbytes,
        )

    def least(self, other: Footprint) -> Footprint:
        """The smaller one of each number."""
        return Footprint(*map(min, astuple(self), astuple(other)))

    def growth(self, before: Footprint, resident_nbytes: int) -> str | None:
        """What grew since ``before``, in words; None when nothing did, and memory by no more than so many bytes."""
        grown = [
            f"{name} {getattr(before, name)} -> {getattr(self, name)}"
            for name in ("descriptors", "threads", "segments")
            if getattr(self, name) > getattr(before, name)
        ]
        if self.resident_nbytes > before.resident_nbytes + resident_nbytes:
            grown.append(f"memory {before.resident_nbytes / 2**20:.1f} -> {self.resident_nbytes / 2**20:.1f} MiB")
        return ", ".join(grown) or None

    def __str__(self) -> str:
        memory = f"{self.resident_nbytes / 2**20:.1f} MiB"
        return f"{self.descriptors} descriptors, {self.threads} threads, {self.segments} segments, {memory}"
