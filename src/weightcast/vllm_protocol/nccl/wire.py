"""What vLLM's native nccl backend puts on the wire, for both ends: the rendezvous, and how packed tensors are cut into chunks.

Rendezvous: rank 0 serves a torch TCPStore and sets one key to a pickle of its 128-byte NCCL id. Nothing is unpickled here: the
pickle of that one class has one form, whose bytes are compared, and the id is the 128 bytes inside.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence

import msgspec
from torch._C._distributed_c10d import TCPStore
from torch.distributed import DistNetworkError, DistStoreError

from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, InvalidInput, PeerLost, ProtocolError, TransportError
from weightcast.manifest import TensorSpec

UNIQUE_ID_NBYTES = 128
DEFAULT_BUFFER_NBYTES = 2**30
DEFAULT_NUM_BUFFERS = 2

_KEY = "broadcast_from/0/0"
_BEFORE_ID = (
    b"\x95\xec\x00\x00\x00\x00\x00\x00\x00\x8c\x07_ctypes\x94\x8c\t_unpickle\x94\x93\x94"
    b"\x8c4vllm.distributed.device_communicators.pynccl_wrapper\x94\x8c\x0cncclUniqueId\x94\x93\x94}\x94C\x80"
)
_AFTER_ID = b"\x94\x86\x94\x86\x94R\x94."
_PROTOCOLS = (b"\x80\x04", b"\x80\x05")


def pickled_unique_id(unique_id: bytes) -> bytes:
    """The bytes that vLLM's workers expect under the rendezvous key."""
    if len(unique_id) != UNIQUE_ID_NBYTES:
        raise InvalidInput(f"an NCCL id has {UNIQUE_ID_NBYTES} bytes, not {len(unique_id)}", field="unique_id")
    return _PROTOCOLS[0] + _BEFORE_ID + unique_id + _AFTER_ID


def unique_id_in(pickled: bytes) -> bytes:
    """The id inside such bytes; ProtocolError when they have any other form."""
    start = 2 + len(_BEFORE_ID)
    unique_id = pickled[start : start + UNIQUE_ID_NBYTES]
    expected = pickled[:2] + _BEFORE_ID + unique_id + _AFTER_ID
    if pickled[:2] not in _PROTOCOLS or len(unique_id) != UNIQUE_ID_NBYTES or pickled != expected:
        raise ProtocolError(
            "the trainer's rendezvous does not hold an NCCL id in vLLM's form",
            hint="Send nccl_unique_id_b64 in init_info instead",
        )
    return unique_id


def serve_unique_id(address: str, unique_id: bytes, world_size: int) -> TCPStore:
    """Rank 0's side: a store on a free port (``.port``) that holds the id; keep it until all ranks have connected."""
    try:
        # Not use_libuv: vLLM's own side is without, and both have to agree.
        store = TCPStore(address, 0, world_size, True, wait_for_workers=False, use_libuv=False)
        store.set(_KEY, pickled_unique_id(unique_id))  # type: ignore[arg-type]
    except (DistNetworkError, DistStoreError, RuntimeError) as error:
        raise TransportError(f"cannot serve the NCCL id on {address}: {error}") from error
    return store


def fetch_unique_id(address: str, port: int, world_size: int, deadline: Deadline) -> bytes:
    """The other ranks' side."""
    where = f"{address}:{port}"
    _await_listener(address, port, deadline)
    try:
        # Counted among the workers: a stock rank 0 sets no key before all of them have come.
        store = TCPStore(address, port, world_size, False, deadline.limit(), wait_for_workers=True, use_libuv=False)
        store.set_timeout(deadline.limit())
        return unique_id_in(store.get(_KEY))
    except (DistNetworkError, DistStoreError) as error:
        if deadline.passed:
            raise DeadlineExceeded(f"no NCCL id from {where} within {deadline.timeout_s:g} s") from error
        raise PeerLost(f"no NCCL id from {where}: {error}") from error


def _await_listener(address: str, port: int, deadline: Deadline) -> None:
    """Return when somebody listens: torch's own wait for that takes up to twice its limit."""
    while True:
        try:
            socket.create_connection((address, port), min(1.0, deadline.limit_s())).close()
        except OSError:
            deadline.check(f"waiting for a rendezvous at {address}:{port}")
            time.sleep(min(0.1, deadline.remaining_s()))
        else:
            return


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """One broadcast of a packed transfer: ``specs[i]`` starts at byte ``offsets[i]``. No alignment, no gaps."""

    specs: tuple[TensorSpec, ...]
    offsets: tuple[int, ...]
    nbytes: int


def chunks_of(specs: Sequence[TensorSpec], buffer_nbytes: int) -> Iterator[Chunk]:
    """Cut as vLLM does: a chunk ends with the tensor that makes it larger than the buffer."""
    if buffer_nbytes <= 0:
        raise InvalidInput(f"a packed buffer of {buffer_nbytes} bytes", field="packed_buffer_size_bytes")
    taken: list[TensorSpec] = []
    offsets: list[int] = []
    end = 0
    for spec in specs:
        taken.append(spec)
        offsets.append(end)
        end += spec.nbytes
        if end > buffer_nbytes:
            yield Chunk(specs=tuple(taken), offsets=tuple(offsets), nbytes=end)
            taken, offsets, end = [], [], 0
    if taken:
        yield Chunk(specs=tuple(taken), offsets=tuple(offsets), nbytes=end)


def single_chunks(specs: Sequence[TensorSpec]) -> Iterator[Chunk]:
    """Unpacked: every tensor is a broadcast of its own."""
    for spec in specs:
        yield Chunk(specs=(spec,), offsets=(0,), nbytes=spec.nbytes)
