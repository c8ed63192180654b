"""AdapterModel: one adapter of an engine as a LiveModel. Its versions lie side by side, and going live is pointing the adapter's name at one.

Load-bearing: bytes land only in memory that no request reads. A version that requests still run on keeps its memory, and the next
round gets another one, as long as a slot is free. Slots are counted before a round's first byte lands.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Generic, NoReturn, Protocol, TypeVar

import msgspec
import torch

from weightcast.content.layout_digest import digest_tensor
from weightcast.errors import InvalidInput, LoadError, Unsupported
from weightcast.layout import Layout, image_layout
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest
from weightcast.manifest.adapters import CONFIG_NAME, AdapterConfig, Factors, factors_of
from weightcast.receiver.base import LiveModel
from weightcast.untrusted.known import known


class Version(Protocol):
    """What an engine makes of the bytes of one version."""

    memory: Memory
    """The memory that the version's bytes lie in."""

    @property
    def in_use(self) -> bool:
        """Whether a request still runs on the version."""
        ...


VersionT = TypeVar("VersionT", bound=Version)


class AdapterModel(LiveModel, Generic[VersionT]):
    """The versions of one adapter. Subclasses say what an engine makes of one, and count slots.

    ``lock`` is held by whatever looks at versions or changes them: rounds do on a thread of their own, requests on the engine's. All
    adapters of an engine have the same one.
    """

    relocatable = True
    always_staged = True

    def __init__(self, name: str, device: torch.device, lock: threading.RLock) -> None:
        self.name, self.device, self.lock = name, device, lock
        self.current: VersionT | None = None
        """The version that the name stands for; None before the first one."""
        self.old: list[VersionT] = []
        """Versions that requests run on, and whose memory no round knows any more."""
        self._manifest = Manifest.of(())
        self._live = Memory(())
        self._made: dict[int, VersionT | None] = {}
        """What ``rebind`` points the name at, by the number of a memory: that which the round before left included."""
        self._is_joined = False

    # -- what an engine supplies

    @abstractmethod
    def check(self, factors: Mapping[str, Factors]) -> None:
        """Raise PlanMismatch or Unsupported for modules, shapes and ranks that the engine cannot compute with."""

    @abstractmethod
    def check_room(self, num_wanted: int) -> None:
        """StateError that names the setting to raise when the engine has no slots for so many more versions. ``lock`` is held."""

    @abstractmethod
    def make(
        self, memory: Memory, config: AdapterConfig, matrices: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    ) -> VersionT:
        """What the engine computes a version with. The matrices are views of ``memory``. LoadError where nothing can be made of them."""

    # -- what versions there are

    @property
    def num_slots(self) -> int:
        """How many slots the adapter takes: one for what is live, one beside it while a trainer is there, and one for each older
        version that requests run on."""
        return len(self.old) + (2 if self._is_joined else int(self.current is not None))

    def versions(self) -> list[VersionT]:
        """The version that is live, and those that requests run on."""
        found = [self.current, *(each for each in self._made.values() if each is not None and each.in_use), *self.old]
        return list(dict.fromkeys(each for each in found if each is not None))

    def released(self) -> None:
        """Forget old versions that no request runs on any more. ``lock`` is held."""
        self.old = [version for version in self.old if version.in_use]

    def remove(self) -> None:
        """Have the name stand for nothing. Requests keep the versions that they run on."""
        with self.lock:
            self.old = [version for version in self.versions() if version.in_use]
            self.current, self._is_joined = None, False
            self._live = self._new_memory(self._manifest)  # those requests read the memory that was live
            self._made = {self._live.number: None}

    # -- LiveModel

    def layout(self, manifest: Manifest) -> Layout:
        """Whole tensors, side by side in the manifest's order."""
        self.check(factors_of(manifest))
        with self.lock:
            if not self._is_joined:
                self.check_room(2 - int(self.current is not None))
            if self._manifest != manifest:
                # The name goes on standing for a version of the former form, to which a roll-back returns.
                self._manifest, self._live = manifest, self._new_memory(manifest)
                self._made = {self._live.number: self.current}
            self._is_joined = True
        return image_layout(manifest)

    def memory(self) -> Memory:
        return self._live

    def spare(self, memory: Memory) -> Memory:
        with self.lock:
            version = self._made.get(memory.number)
            reads = version is not None and version.in_use and version is not self.current
            if version is not None and reads and version.memory is memory:
                self.check_room(1)
            self._made.pop(memory.number, None)
            if version is None or not reads:
                return memory
            self.old.append(version)
            return memory if version.memory is not memory else self._new_memory(self._manifest)

    def derive(self, memory: Memory) -> None:
        views = self._views(memory)
        config = read_config(views[CONFIG_NAME].cpu().numpy().tobytes())
        matrices = {
            module: (views[each.a.name], views[each.b.name]) for module, each in factors_of(self._manifest).items()
        }
        version = self.make(memory, config, matrices)
        with self.lock:
            self._made[memory.number] = version

    def rebind(self, memory: Memory) -> None:
        with self.lock:
            if memory.number not in self._made and memory is not self._live:
                raise InvalidInput("a memory of which no version was made", field="memory")
            if self._live.number not in self._made:
                self._made[self._live.number] = None
            self._live, self.current = memory, self._made[memory.number]

    def forget(self) -> None:
        with self.lock:
            kept = self._made.pop(self._live.number, None)
            self.old += [
                each for each in self._made.values() if each is not None and each.in_use and each is not self.current
            ]
            self._made = {self._live.number: kept}
            self._is_joined = False

    def load_weights(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> NoReturn:
        raise Unsupported("no tensor of an adapter goes through a loader")

    def checksums(self) -> dict[str, str]:
        """Return the hex digest of each tensor of the memory that is live."""
        return {name: f"{digest_tensor(view):016x}" for name, view in self._views(self._live).items()}

    def _views(self, memory: Memory) -> dict[str, torch.Tensor]:
        """The tensors that lie in a memory."""
        return {
            p.region.name: memory.view(p.storage, p.dtype, p.offset, p.region.sizes, p.strides)
            for p in image_layout(self._manifest).placements
        }

    def _new_memory(self, manifest: Manifest) -> Memory:
        return Memory([torch.zeros(manifest.image_nbytes, dtype=torch.uint8, device=self.device)], is_arena=True)


def read_config(data: bytes) -> AdapterConfig:
    """The config of a tensor's bytes; LoadError where they are none."""
    try:
        return msgspec.json.decode(data, type=known(AdapterConfig))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise LoadError(f"{CONFIG_NAME} is no config of an adapter: {error}") from None
