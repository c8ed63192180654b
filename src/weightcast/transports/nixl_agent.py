"""An agent of NIXL: memory that is registered with UCX, and reads of another agent's memory, without waits and without surprises.

Load-bearing:

- Errors of a peer are handled in UCX's mode "peer": a read from a process that died ends with an error instead of never.
- A read from a process that stands still ends when that process goes on. Its handle is not released before (UCX would write into memory
  that it no longer knows of), never twice, and the peer is not forgotten meanwhile.
- NIXL's thread sleeps until something comes. Python's own wrapper of NIXL lets that thread spin, which costs a core a process.
- What agents say to each other is a list of names and numbers that NIXL's C++ reads. Nothing is pickled.
"""

from __future__ import annotations

import os
import secrets
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from weightcast.errors import PeerLost, TransportError, Unsupported

PAIR_NBYTES = 16
RECEIPT = struct.Struct(f"!{PAIR_NBYTES}sQ")
"""What a worker tells the trainer's agent: which pair it is of, and how many parts it has read."""
IDLE_US = 5_000
"""How long NIXL's thread sleeps when nothing wakes it: half a percent of a core, and the price of a wake-up that got lost."""
_SETTINGS = {
    "UCX_HANDLE_ERRORS": "none",
    "UCX_DEBUG_SIGNO": "0",
    "UCX_LOG_LEVEL": "fatal",
    "NIXL_LOG_LEVEL": "FATAL",
}
"""UCX would answer signals of the program (SIGHUP, faults) with handlers of its own, and both would print what is raised here."""


def load_nixl() -> Any:
    """Return NIXL's bindings; Unsupported says what is missing."""
    try:
        with _settings():
            from nixl_cu13 import _bindings
    except ImportError as error:
        raise Unsupported(f"NIXL cannot be loaded: {error}", hint="pip install 'weightcast[nixl]'") from error
    return _bindings


class Extent(NamedTuple):
    """Bytes of one device's memory as NIXL names them."""

    address: int
    nbytes: int
    device: int

    @classmethod
    def of(cls, storage: torch.Tensor) -> Extent:
        return cls(storage.data_ptr(), storage.numel(), storage.device.index or 0)


class Agent:
    """One agent with UCX as its backend. Thread-safe, but for ``close``."""

    def __init__(self) -> None:
        self._nixl = load_nixl()
        errors = [
            value for name, value in vars(self._nixl).items() if name.startswith("nixl") and name.endswith("Error")
        ]
        self._errors: tuple[type[Exception], ...] = (RuntimeError, *errors)
        self.name = f"weightcast-{secrets.token_hex(16)}"
        config = self._nixl.nixlAgentConfig()
        config.useProgThread, config.pthrDelay = True, IDLE_US
        config.useListenThread = False
        config.syncMode = self._nixl.NIXL_THREAD_SYNC_STRICT
        with self._named("making an agent"), _settings():
            self._agent = self._nixl.nixlAgent(self.name, config)
            self._backend = self._agent.createBackend("UCX", {"ucx_error_handling_mode": "peer"})

    def register(self, extents: Sequence[Extent], device: torch.device) -> Any:
        """Let this agent, and agents that have its metadata, reach this memory. The caller keeps the memory until ``deregister``."""
        listed = self._nixl.nixlRegDList(self._kind(device), [(*extent, "") for extent in extents])
        with self._named("registering memory"):
            self._agent.registerMem(listed, [self._backend])
        return listed

    def deregister(self, registered: Any) -> None:
        with self._named("deregistering memory"):
            self._agent.deregisterMem(registered, [self._backend])

    def metadata(self) -> bytes:
        """Return what another agent needs to reach this one and all of its registered memory."""
        with self._named("asking for metadata"):
            return bytes(self._agent.getLocalMD())

    def meet(self, metadata: bytes, name: str) -> None:
        """Know the agent of that name from now on, and begin to connect to it."""
        with self._named("reading the trainer's metadata"):
            found = bytes(self._agent.loadRemoteMD(metadata)).decode(errors="replace")
        if found != name:
            raise TransportError(f"the metadata is of agent {found!r}, not {name!r}")
        with self._named("connecting to the trainer"):
            self._agent.makeConnection(name, [])

    def prepare(self, extents: Sequence[Extent], device: torch.device, peer: str | None = None) -> int:
        """Prepare a list of this agent's registered memory, or of its peer's. Released by ``forget``."""
        table = np.array(extents, dtype=np.uint64).reshape(-1, 3)
        listed = self._nixl.nixlXferDList(self._kind(device), table)
        with self._named("preparing reads"):
            owner = self._nixl.NIXL_INIT_AGENT if peer is None else peer
            return int(self._agent.prepXferDlist(owner, listed, [self._backend]))

    def forget(self, prepared: int) -> None:
        with self._named("releasing a list"):
            self._agent.releasedDlistH(prepared)

    def read(self, here: int, there: int, numbers: range) -> Read:
        """Make a read of some entries of two prepared lists; it can be started any number of times."""
        indices = np.arange(numbers.start, numbers.stop, dtype=np.int32)
        with self._named("preparing a read"):
            handle = self._agent.makeXferReq(
                self._nixl.NIXL_READ, here, indices, there, indices, b"", [self._backend], False
            )
        return Read(self, handle)

    def tell(self, peer: str, message: bytes) -> None:
        """Send the peer a short message; it may arrive later."""
        with self._named("telling the trainer"):
            self._agent.genNotif(peer, message)

    def told(self) -> list[bytes]:
        """Return the messages that have come since the last call, whoever sent them."""
        with self._named("asking for messages"):
            return [bytes(message) for some in self._agent.getNotifs({}, []).values() for message in some]

    def close(self) -> None:
        """End all connections; idempotent. No read is in flight, and no memory is registered."""
        self._agent = self._backend = None

    def _kind(self, device: torch.device) -> Any:
        return self._nixl.VRAM_SEG if device.type == "cuda" else self._nixl.DRAM_SEG

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """NIXL's errors as errors of this package."""
        nixl = self._nixl
        try:
            yield
        except nixl.nixlRemoteDisconnectError:
            raise PeerLost(f"the trainer is gone while {what}") from None
        except self._errors as error:
            raise TransportError(f"NIXL failed while {what}: {error}") from None


class Read:
    """One read, prepared once and started in each round. Not thread-safe."""

    def __init__(self, agent: Agent, handle: int) -> None:
        self._agent, self._handle = agent, handle
        self._is_in_flight = False

    def start(self) -> None:
        """Begin to read. The last start has to be done."""
        agent, nixl = self._agent, self._agent._nixl
        self._is_in_flight = True
        try:
            with agent._named("reading the trainer's memory"):
                self._take(agent._agent.postXferReq(self._handle, b""), nixl)
        except TransportError:
            self._is_in_flight = False
            raise

    def is_done(self) -> bool:
        """Whether the bytes are there. Raises PeerLost or TransportError once the read has failed; nothing is written any more then."""
        if not self._is_in_flight:
            return True
        agent, nixl = self._agent, self._agent._nixl
        try:
            with agent._named("reading the trainer's memory"):
                self._take(agent._agent.getXferStatus(self._handle), nixl)
        except TransportError:
            self._is_in_flight = False
            raise
        return not self._is_in_flight

    def has_ended(self) -> bool:
        """Whether nothing is written any more, for better or worse."""
        try:
            return self.is_done()
        except TransportError:
            return True

    def release(self) -> None:
        """Once, after the read has ended."""
        with self._agent._named("releasing a read"):
            self._agent._agent.releaseXferReq(self._handle)

    def _take(self, status: Any, nixl: Any) -> None:
        if status == nixl.NIXL_SUCCESS:
            self._is_in_flight = False
        elif status != nixl.NIXL_IN_PROG:
            raise TransportError(f"NIXL failed while reading the trainer's memory: {status}")


_environment = threading.Lock()


@contextmanager
def _settings() -> Iterator[None]:
    """What UCX and NIXL read when they are loaded, where the user has not set it."""
    with _environment:
        missing = {name: value for name, value in _SETTINGS.items() if name not in os.environ}
        os.environ.update(missing)
        try:
            yield
        finally:
            for name in missing:
                del os.environ[name]
