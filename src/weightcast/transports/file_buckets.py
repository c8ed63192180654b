"""Files into a memory that no file can be read into, such as a GPU's: read into buffers by plan, and copied from there.

Several buffers take buckets in turn, each with a thread of its own: one is read while another is emptied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from weightcast.deadline import Deadline
from weightcast.layout.memory import Memory
from weightcast.plan import Copy, parts_of
from weightcast.transports.buckets import Bucket, into_bucket, out_of_bucket, schedule
from weightcast.transports.files import OpenFile, ReadBox, ReadRun, compile_reads
from weightcast.transports.movers import Buffer, Mover, Step, mover_for
from weightcast.transports.recent import Recent

BUCKET_NBYTES = 16 * 2**20
LANES = 4


class _Load:
    """One bucket: reads that fill its buffer, and the step that empties it."""

    def __init__(self, bucket: Bucket, files: Sequence[OpenFile | None], buffer: Buffer, empty: Step) -> None:
        copies = [into_bucket(piece) for piece in bucket.pieces]
        self._reads: list[ReadRun | ReadBox] = compile_reads(copies, files, Memory([buffer.host]), BUCKET_NBYTES)
        self._empty = empty

    def run(self, deadline: Deadline, check: Callable[[], None]) -> None:
        for read in self._reads:
            check()
            deadline.check("reading the trainer's files")
            read.run()
        self._empty(deadline)


class FileBuckets:
    """The copies out of some files (by source storage) into whatever memory is given. One receive at a time."""

    def __init__(self, copies: Sequence[Copy], files: Sequence[OpenFile | None], check: Callable[[], None]) -> None:
        self._copies, self._files, self._check = tuple(copies), files, check
        self._parts = parts_of(copies)
        self._lanes: Recent[tuple[Mover, list[list[_Load]]]] = Recent(size=2, parts=len(self._parts))
        self._pool = ThreadPoolExecutor(LANES, thread_name_prefix="weightcast-files")

    def receive(self, memory: Memory, deadline: Deadline, part: int) -> None:
        """Read and copy a part; the values are there when this returns."""
        mover, lanes = self._lanes.get((memory.number, part), lambda: self._compiled(memory, part))

        mover.begin()

        def drive(lane: Sequence[_Load]) -> None:
            for load in lane:
                load.run(deadline, self._check)

        futures = [self._pool.submit(drive, lane) for lane in lanes]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise errors[0]

    def close(self) -> None:
        """Idempotent."""
        self._pool.shutdown()
        self._lanes.clear()

    def _compiled(self, memory: Memory, part: int) -> tuple[Mover, list[list[_Load]]]:
        copies = self._parts.get(part, ())
        mover = mover_for(memory, copies, self._check, is_source=False)
        buckets = schedule(copies, BUCKET_NBYTES)
        buffers = mover.buffers(buckets, LANES)
        lanes: list[list[_Load]] = [[] for _ in buffers]
        for number, bucket in enumerate(buckets):
            lane = number % len(buffers)
            pieces = [out_of_bucket(piece) for piece in bucket.pieces]
            empty = mover.step(pieces, Memory([buffers[lane].near]), memory)
            lanes[lane].append(_Load(bucket, self._files, buffers[lane], empty))
        return mover, lanes
