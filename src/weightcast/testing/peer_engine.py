"""PeerEngine: an engine of one worker in a process of its own, called through a pipe. No HTTP, no model code; CPU or GPU.

Its live weights are a DictModel's, or storages as an engine that fuses parameters has them. Everything that moves weights is the
real thing.
"""

from __future__ import annotations

import ctypes
import gc
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
import torch

from weightcast.deadline import Deadline
from weightcast.errors import EngineError, ErrorForm, PeerLost, Unsupported
from weightcast.layout import Layout
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest
from weightcast.manifest.dtypes import dtype_of
from weightcast.receiver import place
from weightcast.receiver.base import LiveModel
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.testing.ranks import Peer, RankFailed
from weightcast.trainer.clients.base import CommitOrder, CommitReply, EngineClient
from weightcast.untrusted.known import known

CAPABILITY_VERSION = 0x20080522
Shapes = Mapping[str, tuple[tuple[int, ...], str]]


class StoredModel(LiveModel):
    """Landings in storages that stay where they are. All bytes are zero at first."""

    relocatable = False

    def __init__(self, layout: Layout, device: str) -> None:
        self.device = torch.device(device, 0) if device == "cuda" else torch.device(device)
        self._layout = layout
        self._memory = Memory([torch.zeros(n, dtype=torch.uint8, device=self.device) for n in layout.storage_nbytes])

    def layout(self, manifest: Manifest) -> Layout:
        return self._layout

    def memory(self) -> Memory:
        return self._memory

    def rebind(self, memory: Memory) -> None:
        raise Unsupported("these storages stay where they are")

    def load_weights(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        raise Unsupported("these storages have no loader")

    def checksums(self) -> dict[str, str]:
        return {}


class EngineSide:
    """The engine's side, which lives in the engine's process."""

    def __init__(self, shares_gpu: bool = True) -> None:
        if shares_gpu:
            # NCCL takes two ranks on one GPU only where they call themselves different hosts.
            os.environ["NCCL_HOSTID"] = f"engine-{os.getpid()}"
        os.environ["NCCL_SOCKET_IFNAME"] = "lo"
        os.environ["NCCL_RAS_ENABLE"] = "0"
        self._engine: LocalEngine | None = None

    def build(self, shapes: Shapes, mode: str, device: str, options: dict[str, Any]) -> None:
        """Make a DictModel of random values. ``options`` are the DictModel's arguments."""
        tensors = {name: torch.randn(shape).to(dtype_of(dtype)) for name, (shape, dtype) in shapes.items()}
        if device == "cuda":
            tensors = {name: value.cuda() for name, value in tensors.items()}
            device = "cuda:0"
        self._engine = LocalEngine("peer", [DictModel(tensors, device=device, **options)], mode=mode)

    def store(self, layout: bytes, mode: str, device: str) -> None:
        """Make the storages of a layout."""
        model = StoredModel(msgspec.msgpack.decode(layout, type=known(Layout)), device)
        self._engine = LocalEngine("peer", [model], mode=mode)  # type: ignore[list-item]

    def limit(self, device_nbytes: int) -> None:
        """Pretend from now on that a GPU has this much free memory."""
        real = place.free_nbytes
        place.free_nbytes = lambda device: device_nbytes if device.type == "cuda" else real(device)

    def drop_capabilities(self) -> None:
        """Drop all capabilities of this process, whichever user it runs as."""
        header, none = struct.pack("=Ii", CAPABILITY_VERSION, 0), bytes(24)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.capset(header, none):
            raise OSError(ctypes.get_errno(), "capset")

    def make(self, method: str, *args: Any) -> Any:
        """Make a call of the engine. The last of ``args`` is a timeout."""
        assert self._engine is not None
        *rest, timeout_s = args
        if method == "commit":
            epoch, round, version = rest
            order = CommitOrder(epoch=epoch, round=round, version=version)
            return dict(self._engine.commit(order, Deadline(timeout_s)).phases)
        value = getattr(self._engine, method)(*rest, Deadline(timeout_s))
        return dict(value) if isinstance(value, Mapping) else value

    def contents(self) -> dict[str, bytes]:
        """Return the live bytes of a DictModel by name."""
        assert self._engine is not None
        return {
            name: value.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes()
            for name, value in self._engine.models[0].parameters().items()
        }

    def storages(self, numbers: Sequence[int]) -> list[bytes]:
        """Return the bytes of some live storages."""
        assert self._engine is not None
        storages = self._engine.models[0].memory().storages
        return [storages[number].cpu().numpy().tobytes() for number in numbers]

    def free(self) -> None:
        """Forget the engine and free its memory."""
        if self._engine is not None:
            self._engine.stop()
        self._engine = None
        gc.collect()  # live weights and their model refer to each other
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()


class PeerEngine(EngineClient):
    """The trainer's client of an EngineSide. Use it as a context manager: leaving kills the process. ``shares_gpu`` says that the
    process may use the trainer's GPU."""

    kind = "peer"
    host = "127.0.0.1"

    def __init__(self, name: str = "peer", *, shares_gpu: bool = True) -> None:
        self.name = name
        self.peer = Peer(partial(EngineSide, shares_gpu))

    def build(self, shapes: Shapes, *, mode: str = "auto", device: str = "cpu", **options: Any) -> PeerEngine:
        self.peer.call("build", shapes, mode, device, options, timeout_s=60)
        return self

    def store(self, layout: Layout, *, mode: str = "auto", device: str = "cpu") -> PeerEngine:
        self.peer.call("store", msgspec.msgpack.encode(layout), mode, device, timeout_s=60)
        return self

    def world_size(self, deadline: Deadline) -> int:
        return 1

    def init(self, init_info: Mapping[str, Any], deadline: Deadline) -> None:
        self._make("init", deadline, dict(init_info))

    def commit(self, order: CommitOrder, deadline: Deadline) -> CommitReply:
        return CommitReply(phases=self._make("commit", deadline, order.epoch, order.round, order.version))

    def rollback(self, epoch: int, round: int, deadline: Deadline) -> None:
        self._make("rollback", deadline, epoch, round)

    def status(self, deadline: Deadline) -> Mapping[str, Any]:
        return dict(self._make("status", deadline))

    def _make(self, method: str, deadline: Deadline, *args: Any) -> Any:
        left_s = deadline.limit_s()
        try:
            return self.peer.call("make", method, *args, left_s, timeout_s=left_s + 2)
        except BrokenPipeError:
            raise PeerLost("the engine's process is gone", engine=self.name) from None
        except RankFailed as error:
            text = str(error)
            raise ErrorForm(kind=error.kind, message=text).error() if error.kind else EngineError(text) from None

    def __enter__(self) -> PeerEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.peer.__exit__(None, None, None)
