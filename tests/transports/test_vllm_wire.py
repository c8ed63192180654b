"""What vLLM's native nccl backend puts on the wire."""

from __future__ import annotations

import ctypes
import pickle
import random
import socket
import sys
import threading
import types
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, InvalidInput, ProtocolError
from weightcast.manifest import TensorSpec
from weightcast.vllm_protocol.nccl.wire import (
    chunks_of,
    fetch_unique_id,
    pickled_unique_id,
    serve_unique_id,
    single_chunks,
    unique_id_in,
)

MODULE = "vllm.distributed.device_communicators.pynccl_wrapper"


@pytest.fixture
def vllm_class(monkeypatch: pytest.MonkeyPatch) -> type[ctypes.Structure]:
    """A class as vLLM defines it, where pickle looks for it."""

    class ncclUniqueId(ctypes.Structure):
        _fields_ = (("internal", ctypes.c_byte * 128),)

    ncclUniqueId.__module__, ncclUniqueId.__qualname__ = MODULE, "ncclUniqueId"
    parts = MODULE.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
    monkeypatch.setattr(sys.modules[MODULE], "ncclUniqueId", ncclUniqueId, raising=False)
    return ncclUniqueId


@pytest.mark.parametrize("protocol", [4, 5])
def test_the_id_is_read_out_of_what_vllm_pickles(vllm_class: type[ctypes.Structure], protocol: int) -> None:
    unique_id = random.randbytes(128)
    assert unique_id_in(pickle.dumps(vllm_class.from_buffer_copy(unique_id), protocol=protocol)) == unique_id


def test_vllm_unpickles_what_is_written(vllm_class: type[ctypes.Structure]) -> None:
    unique_id = random.randbytes(128)
    theirs = pickle.loads(pickled_unique_id(unique_id))
    assert type(theirs) is vllm_class
    assert bytes(theirs) == unique_id


def test_any_other_pickle_is_refused() -> None:
    good = pickled_unique_id(random.randbytes(128))
    bad = [b"", good[:-1], good + b"\x00", b"\x80\x03" + good[2:], pickle.dumps(random.randbytes(128))]
    bad += [
        good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in range(len(good)) if at != 1 and not 111 <= at < 239
    ]
    for data in bad:
        with pytest.raises(ProtocolError):
            unique_id_in(data)


def test_the_rendezvous_hands_the_id_over() -> None:
    unique_id = random.randbytes(128)
    store = serve_unique_id("127.0.0.1", unique_id, 3)
    for _ in range(2):
        assert fetch_unique_id("127.0.0.1", store.port, 3, Deadline(10.0)) == unique_id


def test_a_rank_0_that_waits_for_its_workers_first_is_joined() -> None:
    """As vLLM's own does: its store is not even made before every worker has come."""
    unique_id = random.randbytes(128)
    listener = socket.create_server(("127.0.0.1", 0))
    port, made = listener.getsockname()[1], []

    def be_rank_0() -> None:
        wait = timedelta(seconds=15)
        store = TCPStore("127.0.0.1", port, 2, True, wait, use_libuv=False, master_listen_fd=listener.detach())
        store.set("broadcast_from/0/0", pickled_unique_id(unique_id))
        made.append(store)

    rank_0 = threading.Thread(target=be_rank_0)
    rank_0.start()
    assert fetch_unique_id("127.0.0.1", port, 2, Deadline(10.0)) == unique_id
    rank_0.join(20)
    assert made


def test_a_rendezvous_without_a_trainer_ends_by_its_deadline() -> None:
    with pytest.raises(DeadlineExceeded):
        fetch_unique_id("127.0.0.1", 1, 2, Deadline(1.0))


def specs_of(sizes: list[int]) -> list[TensorSpec]:
    return [TensorSpec(name=f"t{i}", dtype="uint8", shape=(size,)) for i, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("sizes", "chunks"),
    [
        ([], []),
        ([5], [[5]]),
        ([10], [[10]]),
        ([11], [[11]]),
        ([4, 6, 1], [[4, 6, 1]]),
        ([4, 7, 1], [[4, 7], [1]]),
        ([30, 1, 2], [[30], [1, 2]]),
        ([0, 10, 0, 1, 5], [[0, 10, 0, 1], [5]]),
    ],
)
def test_a_chunk_ends_with_the_tensor_that_passes_the_buffer(sizes: list[int], chunks: list[list[int]]) -> None:
    cut = list(chunks_of(specs_of(sizes), 10))
    assert [[spec.nbytes for spec in chunk.specs] for chunk in cut] == chunks
    for chunk in cut:
        assert chunk.nbytes == sum(spec.nbytes for spec in chunk.specs)
        assert chunk.offsets == tuple(sum(s.nbytes for s in chunk.specs[:i]) for i in range(len(chunk.specs)))


def test_single_chunks_and_a_buffer_of_nothing() -> None:
    assert [chunk.nbytes for chunk in single_chunks(specs_of([3, 0, 9]))] == [3, 0, 9]
    with pytest.raises(InvalidInput):
        list(chunks_of(specs_of([1]), 0))
