"""SafetensorsSource: publish a checkpoint folder straight from its files, which are mapped and never read as a whole."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import torch

from weightcast.deadline import Deadline
from weightcast.errors import InvalidInput, StateError, Unsupported
from weightcast.layout import Layout, Placement, Region, contiguous_strides, image_layout
from weightcast.layout.memory import FileSpan, Memory
from weightcast.manifest import Manifest, TensorSpec
from weightcast.manifest.dtypes import itemsize_of
from weightcast.quoted import quoted
from weightcast.sources.base import Source, wait_for_stream
from weightcast.sources.renaming import Rename, renamed
from weightcast.untrusted.known import known
from weightcast.untrusted.safetensors_format import MAX_TENSORS, Header, open_regular, read_header

MAX_INDEX_NBYTES = 64 * 2**20
SUFFIX = ".safetensors"
INDEX = "model.safetensors.index.json"


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint folder, those that the index lists or, without an index, those that are there.

    Raises InvalidInput for a file that is no index; for an index that lists files which are not there or do not lie in the folder; and
    for a link that leaves the folder for another place than the ``blobs`` that Hugging Face's cache keeps beside the folder.
    """
    index = folder / INDEX
    names = _listed(index) if index.exists() else sorted(path.name for path in folder.glob("*" + SUFFIX))
    if not names:
        raise InvalidInput(f"{folder} holds no safetensors files", field="checkpoint")
    for name in names:
        _check_inside(folder, name)
    return [folder / name for name in names]


def _listed(index: Path) -> list[str]:
    """The file names in an index; each is one of the folder itself."""
    try:
        descriptor = open_regular(str(index))
        try:
            text = os.pread(descriptor, MAX_INDEX_NBYTES, 0)
        finally:
            os.close(descriptor)
        names = sorted(set(msgspec.json.decode(text, type=known(_Index)).weight_map.values()))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OSError) as error:
        raise InvalidInput(f"{index} is no index of a checkpoint: {error}", field="checkpoint") from None
    if not names:
        raise InvalidInput(f"{index} lists no files", field="checkpoint")
    for name in names:
        if name != os.path.basename(name) or not name.endswith(SUFFIX):
            raise InvalidInput(
                f"{index} lists {quoted(name)!r}, which is no safetensors file of the folder",
                field="checkpoint",
                hint="Make the index anew where the checkpoint was saved",
            )
        if not (index.parent / name).exists():
            raise InvalidInput(
                f"{index} lists {quoted(name)}, which is not there",
                field="checkpoint",
                hint="Is the download complete?",
            )
    return names


def _check_inside(folder: Path, name: str) -> None:
    """Raise InvalidInput for a link out of the folder: what comes with a download must not choose which files are published."""
    try:
        target, home = (folder / name).resolve(), folder.resolve()
    except (OSError, RuntimeError):  # RuntimeError: what Python 3.11 and 3.12 make of a link to itself
        raise InvalidInput(f"{folder / name} is a link that leads nowhere", field="checkpoint") from None
    # models--NAME/snapshots/REVISION/file links to models--NAME/blobs/HASH.
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(target.is_relative_to(place) for place in allowed):
        raise InvalidInput(
            f"{folder / name} links to {target}, outside of the folder",
            field="checkpoint",
            hint="Publish the folder that the file lies in, or copy the file",
        )


def _header(path: Path) -> tuple[Header, int]:
    """What lies in a file, and how long the file is."""
    try:
        descriptor = open_regular(str(path))
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}", field="checkpoint") from None
    try:
        return read_header(descriptor, str(path)), os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


class SafetensorsSource(Source):
    """Holdings are read-only maps of the files, one storage a file. They take as much memory as the page cache keeps of the files.

    A tensor that does not start at a multiple of its element size in the file is copied (the format allows such tensors). With another
    ``device`` all tensors are copied there, one after the other, into one arena: for engines that have their weights on a GPU.
    """

    is_private = True

    def __init__(
        self,
        folder: str | Path | Mapping[str, str | Path],
        *,
        device: torch.device | str = "cpu",
        deadline: Deadline | None = None,
        rename: Rename | None = None,
    ) -> None:
        """``folder`` may be several folders by prefix, which ``rename`` sees before their names. ``deadline`` ends the reading of headers
        of a folder with very many tensors."""
        self._given = folder if isinstance(folder, Mapping) else {"": folder}
        then = dict(self._given)
        self._then, self._folders = then, {prefix: Path(path) for prefix, path in then.items()}
        wanted = _usable(device)
        self.device = torch.device("cpu")
        specs: list[TensorSpec] = []
        placements: list[Placement] = []
        storages: list[torch.Tensor] = []
        files: list[FileSpan | None] = []
        for prefix, path in self._files():
            if deadline is not None:
                deadline.check(f"reading the header of {path.name}")
            header, nbytes = _header(path)
            if len(specs) + len(header.tensors) > MAX_TENSORS:
                raise InvalidInput(
                    f"{path.parent} has more than {MAX_TENSORS} tensors",
                    field="checkpoint",
                    hint="Publish a part of it",
                )
            number = len(storages)
            storages.append(_mapped(path, nbytes))
            files.append(FileSpan(path=str(path.resolve()), offset=0))
            for name, stored in header.tensors.items():
                spec = TensorSpec(name=prefix + name, dtype=stored.dtype, shape=stored.shape)
                specs.append(spec)
                storage, offset = number, stored.begin
                if offset % itemsize_of(spec.dtype):
                    storages.append(storages[number][offset : stored.end].clone())
                    files.append(None)
                    storage, offset = len(storages) - 1, 0
                placements.append(_placed(spec, storage, offset))
        self._stamp = self._current_stamp()
        if rename is not None:
            new = renamed((spec.name for spec in specs), rename)
            specs = [msgspec.structs.replace(spec, name=new[spec.name]) for spec in specs]
            placements = [_named(placement, new[placement.region.name]) for placement in placements]
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

    def _files(self) -> Iterator[tuple[str, Path]]:
        """The files of all folders, and the prefix of the names in each."""
        for prefix, folder in self._folders.items():
            yield from ((prefix, path) for path in checkpoint_files(folder))

    def _current_stamp(self) -> list[tuple[str, int, int]]:
        stats = [(path, path.stat()) for _, path in self._files()]
        return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats]

    def tensor(self, name: str) -> torch.Tensor:
        """Return one tensor's values from the map of its file."""
        spec = self.manifest[name]
        place = self.layout.placements[self.manifest.tensors.index(spec)]
        return self.memory.view(place.storage, place.dtype, place.offset, place.region.sizes, place.strides)

    def rebind(self, memory: Memory) -> None:
        self.memory = memory

    def refresh(self) -> None:
        self.check_form()

    def check_form(self) -> None:
        if dict(self._given) != self._then:
            raise StateError(
                f"the source has other folders than at connect(): {', '.join(map(str, self._given.values()))}",
                hint="Call connect() to publish these",
            )
        if self._current_stamp() != self._stamp:
            raise StateError(
                f"the files of {', '.join(map(str, self._folders.values()))} changed since connect()",
                hint="Call connect() to publish the files as they are now",
            )


def _named(placement: Placement, name: str) -> Placement:
    return msgspec.structs.replace(placement, region=msgspec.structs.replace(placement.region, name=name))


def _mapped(path: Path, nbytes: int) -> torch.Tensor:
    """The file as memory. It may say that it is larger than any memory: a file with holes takes no disk."""
    try:
        mapped = torch.UntypedStorage.from_file(str(path), False, nbytes)
    except RuntimeError as error:
        why = quoted(str(error).partition("\n")[0])
        raise InvalidInput(f"{path} cannot be mapped into memory: {why}", field="checkpoint") from None
    return torch.empty(0, dtype=torch.uint8, device="cpu").set_(mapped)  # type: ignore[arg-type]


def _usable(device: torch.device | str) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError:
        raise InvalidInput(f"there is no device {device!r}", field="device", hint="Choose cpu or cuda") from None
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
