"""SafetensorsSource: publish a checkpoint folder straight from its files, which are mapped and never read as a whole.

Format of a file (github.com/huggingface/safetensors, "Format"): 8 bytes little-endian header size, a JSON object of that
size that maps names to {"dtype", "shape", "data_offsets": [begin, end] after the header}, then the data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch

from weightcast.dtypes import itemsize_of
from weightcast.errors import InvalidInput, StateError, Unsupported
from weightcast.known import known
from weightcast.layout import Layout, Placement, Region, contiguous_strides, image_layout
from weightcast.manifest import Manifest, TensorSpec
from weightcast.memory import FileSpan, Memory
from weightcast.trainer.sources.base import Source, wait_for_stream

MAX_HEADER_NBYTES = 100 * 2**20

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, as its index lists them or as they lie there; raises InvalidInput for
    an index that is none, or that lists files that are not there."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(msgspec.json.decode(index.read_bytes(), type=known(_Index)).weight_map.values()))
        except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
            raise InvalidInput(f"{index} is no index of a checkpoint: {error}", field="checkpoint") from None
        absent = [name for name in names if not (folder / name).is_file()]
        if absent or not names:
            what = f"lists {absent[0]}, which is not there" if absent else "lists no files"
            raise InvalidInput(f"{index} {what}", field="checkpoint", hint="Is the download complete?")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InvalidInput(f"{folder} holds no safetensors files", field="checkpoint")
    return files


def read_header(path: Path) -> tuple[dict[str, _Entry], int]:
    """Entries of one file and where its data begins; raises InvalidInput for anything that is not the format."""
    nbytes = path.stat().st_size
    with path.open("rb") as file:
        header_nbytes = int.from_bytes(file.read(8), "little")
        if not 2 <= header_nbytes <= min(MAX_HEADER_NBYTES, nbytes - 8):
            raise InvalidInput(f"{path} is not a safetensors file", field="checkpoint")
        try:
            header: dict[str, Any] = msgspec.json.decode(file.read(header_nbytes), type=known(dict[str, Any]))
            header.pop("__metadata__", None)
            entries = msgspec.convert(header, known(dict[str, _Entry]))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidInput(f"{path}: bad safetensors header: {error}", field="checkpoint") from None
    start = 8 + header_nbytes
    for name, entry in entries.items():
        begin, end = entry.data_offsets
        if entry.dtype not in _DTYPES or not 0 <= begin <= end or start + end > nbytes:
            raise InvalidInput(f"{path}: tensor {name!r} has dtype {entry.dtype} and lies at {begin}..{end}")
    return entries, start


class SafetensorsSource(Source):
    """Holdings are read-only maps of the files, one storage a file; memory use is what the page cache keeps.

    Tensors that do not start at a multiple of their element size in the file are copied (the format allows it). With another
    ``device`` the tensors are copied there, one after the other, into one arena: for engines that have their weights on a GPU.
    """

    def __init__(self, folder: str | Path, *, device: torch.device | str = "cpu") -> None:
        self.folder = Path(folder)
        wanted = _usable(device)
        self.device = torch.device("cpu")
        specs: list[TensorSpec] = []
        placements: list[Placement] = []
        storages: list[torch.Tensor] = []
        files: list[FileSpan | None] = []
        for path in checkpoint_files(self.folder):
            entries, start = read_header(path)
            nbytes = path.stat().st_size
            number = len(storages)
            mapped = torch.UntypedStorage.from_file(str(path), False, nbytes)
            storages.append(torch.empty(0, dtype=torch.uint8).set_(mapped))  # type: ignore[arg-type]
            files.append(FileSpan(path=str(path.resolve()), offset=0))
            for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
                spec = TensorSpec(name=name, dtype=_DTYPES[entry.dtype], shape=entry.shape)
                begin, end = (start + offset for offset in entry.data_offsets)
                if end - begin != spec.nbytes:
                    raise InvalidInput(
                        f"{path}: tensor {name!r} has {end - begin} bytes, its shape needs {spec.nbytes}"
                    )
                specs.append(spec)
                storage, offset = number, begin
                if begin % itemsize_of(spec.dtype):
                    storages.append(storages[number][begin:end].clone())
                    files.append(None)
                    storage, offset = len(storages) - 1, 0
                placements.append(_placed(spec, storage, offset))
            self._stamp = _stamp(self.folder)
        self.manifest = Manifest.of(specs)
        placements.sort(key=lambda placement: placement.region.name)
        self.memory = Memory(storages, files=files)
        self.layout = Layout(placements=tuple(placements), storage_nbytes=tuple(s.numel() for s in storages))
        if wanted.type != "cpu":
            self._stage(wanted)

    def _stage(self, device: torch.device) -> None:
        """Continue on a copy of all tensors in one arena on ``device``."""
        layout = image_layout(self.manifest)
        nbytes = layout.storage_nbytes[0]
        try:
            arena = Memory([torch.zeros(nbytes, dtype=torch.uint8, device=device)], is_arena=True)
        except torch.OutOfMemoryError:
            raise Unsupported(
                f"there is no room for the checkpoint's {nbytes} bytes on {device}",
                hint="Choose another GPU, cuda:1 say",
            ) from None
        held = {placement.region.name: placement for placement in self.layout.placements}
        for placement in layout.placements:
            _view(arena, placement).copy_(_view(self.memory, held[placement.region.name]))
        self.memory, self.layout, self.device = arena, layout, arena.storages[0].device
        wait_for_stream(self.device)

    def tensor(self, name: str) -> torch.Tensor:
        """The values of one tensor where they are mapped."""
        spec = self.manifest[name]
        place = self.layout.placements[self.manifest.tensors.index(spec)]
        return self.memory.view(place.storage, place.dtype, place.offset, place.region.sizes, place.strides)

    def rebind(self, memory: Memory) -> None:
        self.memory = memory

    def refresh(self) -> None:
        if _stamp(self.folder) != self._stamp:
            raise StateError(f"the files of {self.folder} changed since connect()", hint="Connect again")


def _usable(device: torch.device | str) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InvalidInput(f"{device!r} is no device: {error}", field="device") from None
    if found.type not in ("cpu", "cuda"):
        raise Unsupported(f"a checkpoint on {found}", hint="Choose cpu or cuda")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise Unsupported(f"this machine has no GPU {found}", hint="Engines on a CPU take a checkpoint from the CPU")
    return found


def _view(memory: Memory, placement: Placement) -> torch.Tensor:
    return memory.view(placement.storage, placement.dtype, placement.offset, placement.region.sizes, placement.strides)


def _placed(spec: TensorSpec, storage: int, offset_nbytes: int) -> Placement:
    return Placement(
        region=Region.whole(spec),
        dtype=spec.dtype,
        storage=storage,
        offset=offset_nbytes // itemsize_of(spec.dtype),
        strides=contiguous_strides(spec.shape),
    )


def _stamp(folder: Path) -> list[tuple[str, int, int]]:
    stats = [(path, path.stat()) for path in checkpoint_files(folder)]
    return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats]
