"""Reading weights out of safetensors files by plan, without mapping them and without copying them first.

A worker opens no file but below the folders that its operator named (CHECKPOINT_ROOT), and reads nothing of one but the tensors that the
file's own header lists: whoever publishes names the path, and must not learn of files that are none of theirs.

Files are read, not mapped: a file that is truncated while it is mapped kills the reader with SIGBUS, a short read is an error.
Where a run of bytes is contiguous at both ends it is read straight into its place.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

import msgspec
import torch

from weightcast.errors import InvalidInput, TransportError, Unsupported
from weightcast.layout import geometry as geo
from weightcast.layout.memory import Memory
from weightcast.manifest.dtypes import itemsize_of
from weightcast.plan import Copy, Run, merge, narrowed
from weightcast.plan.replay import Replay
from weightcast.untrusted.safetensors_format import open_regular, read_header

if TYPE_CHECKING:
    from typing_extensions import Buffer

CHECKPOINT_ROOT = "WEIGHTCAST_CHECKPOINT_ROOT"
"""Variable: folders, separated like those of PATH."""
_SCRATCH_NBYTES = 16 * 2**20


class FileRef(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of a file, and the identity that the file had when it was offered."""

    path: str
    offset: int
    nbytes: int
    device: int
    inode: int
    modified_ns: int


def checkpoint_roots() -> tuple[str, ...]:
    """The folders below which this process opens files of weights that a trainer names, without links."""
    named = os.environ.get(CHECKPOINT_ROOT, "").split(os.pathsep)
    return tuple(os.path.realpath(root) for root in named if root)


def outside(folders: Sequence[str], roots: Sequence[str]) -> str | None:
    """The first of some folders that lies below none of the roots."""
    for folder in folders:
        if not any(os.path.commonpath([folder, root]) == root for root in roots):
            return folder
    return None


def file_ref(path: str, offset: int, nbytes: int) -> FileRef:
    """Describe ``nbytes`` at ``offset`` of a file."""
    path = os.path.realpath(path)
    descriptor = _open(path)
    try:
        info = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    if offset < 0 or offset + nbytes > info.st_size:
        raise TransportError(f"{path} has {info.st_size} bytes, not {offset + nbytes}")
    return FileRef(
        path=path,
        offset=offset,
        nbytes=nbytes,
        device=info.st_dev,
        inode=info.st_ino,
        modified_ns=info.st_mtime_ns,
    )


class OpenFile:
    """An offered file, opened read-only below a root and recognised as the one that the trainer described.

    Unsupported for a path that lies below no root; TransportError for a file that is not the one, or no safetensors file.
    """

    def __init__(self, ref: FileRef) -> None:
        self.ref = ref
        if not os.path.isabs(ref.path) or "\0" in ref.path:
            raise Unsupported(f"{ref.path!r} is no absolute path")
        path = os.path.realpath(ref.path)
        self._check_place(
            path
        )  # before it is opened: an error of the system's would tell what lies outside of the roots
        self.descriptor = _open(path)
        self._close = weakref.finalize(self, os.close, self.descriptor)
        try:
            # Asked of what is open: the path may have become a link since it was looked up.
            self._check_place(os.readlink(f"/proc/self/fd/{self.descriptor}"))
            self.check()
            self._header = read_header(self.descriptor, ref.path)
        except InvalidInput as error:
            self.close()
            raise TransportError(error.message) from None
        except BaseException:
            self.close()
            raise

    def _check_place(self, path: str) -> None:
        if outside([os.path.dirname(path)], checkpoint_roots()) is not None:
            raise Unsupported(
                f"this engine opens no files in {os.path.dirname(self.ref.path)}",
                hint=f"Start it with {CHECKPOINT_ROOT} (weightcast serve --checkpoint-root) set to a folder above",
            )

    def check_copy(self, copy: Copy) -> None:
        """Raise TransportError where a copy out of the offered part reads anything but a part of one tensor of the file."""
        if copy.region.numel == 0:
            return
        begin = self.ref.offset + copy.src_offset * itemsize_of(copy.src_dtype)
        if not self._header.holds(begin, begin + _span_nbytes(copy)):
            raise TransportError(f"{copy.region.name} is no part of one tensor of {self.ref.path}")

    def check(self) -> None:
        """Raise TransportError when the file is not, or no longer, what was offered."""
        info = os.fstat(self.descriptor)
        found = (info.st_dev, info.st_ino, info.st_mtime_ns)
        if found != (self.ref.device, self.ref.inode, self.ref.modified_ns):
            raise TransportError(f"{self.ref.path} was changed since it was offered", hint="Publish it again")
        if info.st_size < self.ref.offset + self.ref.nbytes:
            raise TransportError(f"{self.ref.path} has {info.st_size} bytes, less than was offered")

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fill ``target`` from byte ``offset`` of the offered part."""
        while target:
            count = os.preadv(self.descriptor, [target], self.ref.offset + offset)
            if count == 0:
                raise TransportError(f"{self.ref.path} became shorter while it was read")
            target, offset = target[count:], offset + count

    def close(self) -> None:
        """Idempotent."""
        self._close()


class ReadRun:
    """One run of bytes of a file, read straight into its place."""

    def __init__(self, file: OpenFile, offset: int, target: torch.Tensor) -> None:
        self._file = file
        self._offset = offset
        self._target = _buffer(target)

    def run(self) -> int:
        self._file.read_into(self._target, self._offset)
        return len(self._target)


class ReadBox:
    """A box that is strided at one end, or is cast: the bytes around it are read to a scratch and copied from there."""

    def __init__(self, file: OpenFile, copy: Copy, scratch: torch.Tensor, memory: Memory) -> None:
        self._file = file
        itemsize = itemsize_of(copy.src_dtype)
        self._offset = copy.src_offset * itemsize
        self._target = _buffer(scratch[: _span_nbytes(copy)])
        in_scratch = msgspec.structs.replace(copy, src_storage=0, src_offset=0)
        self._replay = Replay([in_scratch], Memory([scratch]), memory)

    def run(self) -> int:
        self._file.read_into(self._target, self._offset)
        return self._replay.run()


def compile_reads(
    copies: Sequence[Copy], files: Sequence[OpenFile | None], memory: Memory, max_nbytes: int
) -> list[ReadRun | ReadBox]:
    """The copies out of ``files`` (by source storage) into ``memory`` as steps of at most ``max_nbytes`` each."""
    runs, rest = merge(copies)
    steps: list[ReadRun | ReadBox] = []
    for run in runs:
        steps += _read_run(run, _file(files, run.src_storage), memory, max_nbytes)
    if rest:
        scratch = torch.empty(min(max_nbytes, _SCRATCH_NBYTES), dtype=torch.uint8, device="cpu")
        steps += [
            ReadBox(_file(files, copy.src_storage), piece, scratch, memory)
            for copy in rest
            for piece in _cut(copy, scratch.numel())
        ]
    return steps


def _read_run(run: Run, file: OpenFile, memory: Memory, max_nbytes: int) -> Iterator[ReadRun]:
    for start in range(0, run.nbytes, max_nbytes):
        count = min(max_nbytes, run.nbytes - start)
        target = memory.storages[run.dst_storage][run.dst_offset + start :][:count]
        yield ReadRun(file, run.src_offset + start, target)


def _buffer(tensor: torch.Tensor) -> memoryview:
    return memoryview(cast("Buffer", tensor.numpy()))


def _file(files: Sequence[OpenFile | None], storage: int) -> OpenFile:
    file = files[storage]
    assert file is not None
    return file


def _span_nbytes(copy: Copy) -> int:
    """Bytes of the source from the first to the last element of the box."""
    return geo.span(copy.sizes, copy.src_strides) * itemsize_of(copy.src_dtype)


def _cut(copy: Copy, max_span_nbytes: int) -> Iterator[Copy]:
    """Halve the dimension that reaches farthest in the source until a part's span fits."""
    if _span_nbytes(copy) <= max_span_nbytes:
        yield copy
        return
    dim = max(range(len(copy.sizes)), key=lambda d: (copy.sizes[d] - 1) * copy.src_strides[d])
    half = copy.sizes[dim] // 2
    yield from _cut(narrowed(copy, dim, 0, half), max_span_nbytes)
    yield from _cut(narrowed(copy, dim, half, copy.sizes[dim] - half), max_span_nbytes)


def _open(path: str) -> int:
    """A read-only descriptor of a regular file, whose name may end in anything: caches name files by their digest."""
    try:
        return open_regular(path)
    except InvalidInput as error:
        raise Unsupported(error.message) from None
    except OSError as error:
        raise TransportError(
            f"cannot open {path}: {error.strerror}", hint="Trainer and worker must see the same files"
        ) from None
