"""Hints of what needs no engine and no trainer: the mistake, the hint, and the hint followed."""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.support.mistakes import Mistake

from weightcast.commit.worker_outcome import WorkerOutcome, common_version, outcomes_from, require_all
from weightcast.control import Coordinator, pump
from weightcast.deadline import Deadline
from weightcast.digest.versions import MAX_DIGITS
from weightcast.errors import (
    DeadlineExceeded,
    EngineError,
    InvalidInput,
    PeerLost,
    ProtocolError,
    ShadowError,
    StateError,
    TransportError,
    Unsupported,
)
from weightcast.facts import Facts
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest, TensorSpec
from weightcast.messages import Begin, Heartbeat, decode, encode
from weightcast.receiver import place
from weightcast.receiver.pairs import Pairs
from weightcast.receiver.session import Session
from weightcast.receiver.swap import _swapper
from weightcast.receiver.worker_round import RoundId, WorkerRound
from weightcast.trainer.fleet.numbers import Numbers
from weightcast.trainer.ranks.meeting import _HEAD_NBYTES, FRAME_NBYTES, Meeting
from weightcast.transports.arena import Arena
from weightcast.transports.buckets import check_bucket_nbytes
from weightcast.transports.guard import EndGuard
from weightcast.transports.lanes import Lanes
from weightcast.transports.nccl import NcclWorkerEnd
from weightcast.transports.nccl_cut import NcclOffer
from weightcast.transports.registry import registry
from weightcast.transports.rendezvous import Listener
from weightcast.transports.window_pipes import WindowPipes
from weightcast.untrusted.plugins import VARIABLE
from weightcast.untrusted.safetensors_format import open_regular, read_header
from weightcast.untrusted.secret import usable_token
from weightcast.weight_transfer.factory import WeightTransferEngineFactory

SPECS = [TensorSpec(name=name, dtype="float32", shape=(2,)) for name in ("b", "a")]


def _facts(*transports: str, host: str = "here") -> Facts:
    return Facts(host=host, pid=1, device="cpu", transports=transports)


def _outcome(rank: int, version: str) -> WorkerOutcome:
    return WorkerOutcome(rank=rank, weight_version=version, digest="", dirty=False)


def _used_up() -> Mistake:
    engine = SimpleNamespace(highest=10**MAX_DIGITS - 1)
    fleet: Any = SimpleNamespace(number_used=0, engines=[engine])

    def restart() -> None:
        engine.highest = 0
        assert Numbers(fleet, 0).next() == 1

    return Mistake(
        make=lambda: Numbers(fleet, 0).next(), error=StateError, said="numbers are used up",
        hint="Restart the engines, and begin another log", follow=restart,
    )  # fmt: skip


def _dead_end() -> Mistake:
    guard = EndGuard("the worker's end")
    with pytest.raises(RuntimeError), guard.use("receiving", Deadline(5)):
        raise RuntimeError("a fault")
    return Mistake(
        make=guard.check, error=TransportError, said="is dead: receiving failed with RuntimeError: a fault",
        hint="Make a new pair", follow=EndGuard("the worker's end").check,
    )  # fmt: skip


def _called_off() -> Mistake:
    deadline = Deadline(5)
    deadline.cancel()
    return Mistake(
        make=lambda: deadline.check("joining"), error=DeadlineExceeded, said="joining was called off",
        hint="being closed, or the engine is gone", follow=lambda: Deadline(5).check("joining"),
    )  # fmt: skip


def _transport(name: str, *facts: str, others: str = "there") -> Callable[[], object]:
    return lambda: registry().choose(_facts(*facts), _facts(*facts, host=others), name or None)


def _on(device: str) -> Any:
    """A tensor on a GPU, as far as its kind is asked for."""
    return SimpleNamespace(device=torch.device(device), is_cuda=True)


def _nccl_end(num_cuts: int) -> NcclWorkerEnd:
    """A worker's end for a plan of nothing, of a trainer that cuts it into so many parts."""
    about: dict[str, Any] = {
        "unique_id": b"",
        "rank": 1,
        "world_size": 2,
        "address": "127.0.0.1",
        "port": 1,
        "secret": b"",
    }
    return NcclWorkerEnd([], NcclOffer(bucket_nbytes=1 << 20, cuts=(256,) * num_cuts, **about))


def _receive() -> object:
    round: Any = WorkerRound()
    assert round.begin(RoundId(epoch=1, round=1), Deadline(5))
    pairs = Pairs(torch.device("cpu"), round, lambda message: None, lambda dead: None)
    return pairs.receive(RoundId(epoch=1, round=1), Memory(()), Manifest.of(SPECS), Deadline(5))


def _too_early() -> Mistake:
    """A trainer begins the next round while the last one goes live."""
    round, told = WorkerRound(), list[StateError]()
    first, second = RoundId(epoch=1, round=1), RoundId(epoch=1, round=2)
    approval: Any = SimpleNamespace(version="1-a")
    assert round.begin(first)
    assert round.verified(first, approval)
    assert round.wait_for_approval(first, Deadline(5)) is approval
    worker: Any = SimpleNamespace(
        round=round, mode="in_place", _serves=lambda: "", send_failure=lambda id, phase, error: told.append(error)
    )

    def begin() -> None:
        Session._open(worker, Begin(epoch=1, round=2, base=None, changes=False, timeout_s=5.0))
        if told:
            raise told.pop()

    def when_that_is_done() -> None:
        assert round.committed(first)
        begin()
        assert round.id == second

    return Mistake(
        make=begin, error=StateError, said=r"round .*1.* is still committing", hint="Publish again when that is done",
        follow=when_that_is_done,
    )  # fmt: skip


def _met(said: bytes | Exception | None) -> bool:
    """Two ranks meet; the other one says this, or as much as this one."""
    meeting = Meeting.__new__(Meeting)
    meeting.size, meeting._group, meeting._device = 2, None, torch.device("cpu")

    def gather(received: list[torch.Tensor], sent: torch.Tensor, **_: object) -> Any:
        if isinstance(said, Exception):
            raise said
        for tensor in received:
            tensor.copy_(sent)
        if said is not None:
            received[1].copy_(torch.frombuffer(bytearray(_framed(said)), dtype=torch.uint8))
        return SimpleNamespace(wait=lambda timeout: None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("weightcast.trainer.ranks.meeting.dist.all_gather", gather)
        return meeting.meet(Deadline(30))


def _framed(said: bytes) -> bytes:
    return len(said).to_bytes(_HEAD_NBYTES, "big") + said + bytes(FRAME_NBYTES - _HEAD_NBYTES - len(said))


PLAIN: dict[str, Callable[[], Mistake]] = {
    "manifest out of order": lambda: Mistake(
        make=lambda: Manifest(tensors=tuple(SPECS)), error=InvalidInput, said="'a' comes after 'b'",
        hint=r"Manifest\.of", follow=lambda: Manifest.of(SPECS),
    ),
    "token in bytes": lambda: Mistake(
        make=lambda: usable_token(b"abc"), error=InvalidInput, said="a text, not bytes", hint="Decode bytes",  # type: ignore[arg-type]
        follow=lambda: usable_token(b"abc".decode()),
    ),
    "token with a space": lambda: Mistake(
        make=lambda: usable_token("a b"), error=InvalidInput, said="printable ASCII characters without a space",
        hint=r"secrets\.token_urlsafe\(32\)", follow=lambda: usable_token(secrets.token_urlsafe(32)),
    ),
    "bucket": lambda: Mistake(
        make=lambda: check_bucket_nbytes(100), error=InvalidInput, said="a multiple of 256", hint="Leave it out",
    ),
    "message of another version": lambda: Mistake(
        make=lambda: decode(b"\x01" + encode(Heartbeat())[1:]), error=ProtocolError, said="protocol 1, expected",
        hint="same weightcast on both sides", follow=lambda: decode(encode(Heartbeat())),
    ),
    "transport that nobody knows": lambda: Mistake(
        make=lambda: registry().get("pigeon"), error=Unsupported, said="no transport 'pigeon'", hint="Known: .*shm.*tcp",
        follow=lambda: registry().get("tcp"),
    ),
    "transport that the other side lacks": lambda: Mistake(
        make=_transport("shm", "tcp"), error=Unsupported, said="the trainer cannot load it",
        hint='transport="auto" takes one', follow=_transport("", "tcp"),
    ),
    "no transport at all": lambda: Mistake(
        make=_transport(""), error=Unsupported, said="no transport between trainer 1 and worker 1",
        hint="`weightcast doctor` on both machines", follow=_transport("", "tcp"),
    ),
    "address of another machine": lambda: Mistake(
        make=lambda: Listener("192.0.2.1", EndGuard("e")), error=TransportError, said="cannot listen on 192.0.2.1",
        hint="an address of this machine", follow=lambda: Listener("127.0.0.1", EndGuard("e")).close(),
    ),
    "control on another machine's address": lambda: Mistake(
        make=lambda: Coordinator("192.0.2.1"), error=InvalidInput, said="cannot listen on 192.0.2.1",
        hint="an address of this machine", follow=lambda: Coordinator("127.0.0.1").close(),
    ),
    "answers of other workers": lambda: Mistake(
        make=lambda: outcomes_from([{"ok": True}]), error=EngineError, said="answered something else",
        hint=r'"backend": "weightcast"', follow=lambda: outcomes_from([{"rank": 0, "weight_version": "1", "digest": "", "dirty": False}]),
    ),
    "replicas behind one door": lambda: Mistake(
        make=lambda: require_all([_outcome(0, "1-a")], 2), error=Unsupported, said="1 of 2 workers answered",
        hint="each data-parallel replica as a server of its own", follow=lambda: require_all([_outcome(0, "1-a")], 1),
    ),
    "workers that differ": lambda: Mistake(
        make=lambda: common_version([_outcome(0, "1-a"), _outcome(1, "2-b")]), error=EngineError, said="do not agree",
        hint="Publish again", follow=lambda: common_version([_outcome(0, "3-c"), _outcome(1, "3-c")]),
    ),
    "memory of several GPUs": lambda: Mistake(
        make=lambda: _swapper([(_on("cuda:0"), _on("cuda:1"))]), error=Unsupported, said="a swap between several GPUs",
        hint="on the GPU of the parameters", follow=lambda: _swapper([(torch.empty(4), torch.empty(4))]),
    ),
    "host memory that is not pinned": lambda: Mistake(
        make=lambda: _swapper([(_on("cuda:0"), torch.empty(4))]), error=InvalidInput, said="has to be page-locked",
        hint="pin_memory=True",
    ),
    "a pair before it is connected": lambda: Mistake(
        make=lambda: Lanes("the worker's end").first, error=TransportError, said="not connected", hint=r"connect\(\) first",
    ),
    "a plan that is cut otherwise": lambda: Mistake(
        make=lambda: _nccl_end(3), error=ProtocolError, said="cuts the plan otherwise",
        hint="same weightcast on both sides", follow=lambda: _nccl_end(0),
    ),
    "a round before the one before is over": _too_early,
    "a round without an epoch": lambda: Mistake(
        make=lambda: _receive(), error=StateError, said="no epoch is set up", hint="has to connect again",
    ),
    "ranks that speak otherwise": lambda: Mistake(
        make=lambda: _met(b"\xc1"), error=ProtocolError, said="a trainer rank said something else",
        hint="same weightcast on all ranks", follow=lambda: _met(None),
    ),
    "a rank that did not come": lambda: Mistake(
        make=lambda: _met(RuntimeError("Connection closed by peer\nmore")), error=PeerLost,
        said="could not meet over their process group: Connection closed by peer ",
        hint="on every rank of the process group, or give process_group=None",
    ),
    "numbers": _used_up,
    "end after a fault": _dead_end,
    "wait that was called off": _called_off,
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_what_needs_nothing_else(name: str) -> None:
    PLAIN[name]().play()


def test_files_that_are_no_safetensors(tmp_path: Path) -> None:
    def read(path: Path) -> None:
        descriptor = open_regular(str(path))
        try:
            read_header(descriptor, str(path))
        finally:
            os.close(descriptor)

    (tmp_path / "text").write_text("not one of these, but a text")
    (tmp_path / "folder").mkdir()
    header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}'
    (tmp_path / "gap").write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    save_file({"w": torch.randn(2)}, tmp_path / "good")
    for name, said in (("text", "not a safetensors file"), ("folder", "not a regular file"), ("gap", "behind bytes")):
        Mistake(
            make=lambda name=name: read(tmp_path / name), error=InvalidInput, said=said,  # type: ignore[misc]
            hint="Save the checkpoint anew with safetensors", follow=lambda: read(tmp_path / "good"),
        ).play()  # fmt: skip


def test_a_package_that_the_operator_did_not_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    point = importlib.metadata.EntryPoint("stranger", "builtins:dict", "weightcast.weight_transfer_engines")
    monkeypatch.setattr("weightcast.weight_transfer.factory.entry_points_of", lambda group: {"stranger": point})
    monkeypatch.setenv(VARIABLE, "other")

    def add() -> None:
        monkeypatch.setenv(VARIABLE, "other,stranger")
        assert WeightTransferEngineFactory.engine_class("stranger") is dict

    Mistake(
        make=lambda: WeightTransferEngineFactory.engine_class("stranger"), error=Unsupported, said="does not name 'stranger'",
        hint=f"Add it to {VARIABLE}", follow=add,
    ).play()  # fmt: skip


def test_no_descriptors_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = itertools.count()

    def few(*given: Any) -> int:
        if next(limit) > 3:
            raise OSError(24, "Too many open files")
        return opened(*given)

    opened = os.open
    with monkeypatch.context() as patch:
        patch.setattr(pump.os, "open", few)
        Mistake(make=pump.new_context, error=TransportError, said="may open no more files", hint=r"ulimit -n").play()
    pump.new_context().term()


def test_memory_for_a_staged_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "host_room_nbytes", lambda: None)
    Mistake(
        make=lambda: place.free_nbytes(torch.device("cpu")), error=ShadowError, said="how much memory is free",
        hint="Ask for mode in_place",
    ).play()  # fmt: skip
    monkeypatch.setattr(place, "host_room_nbytes", lambda: 10)
    model: Any = SimpleNamespace(
        memory=lambda: SimpleNamespace(nbytes=1000, storages=()), device=torch.device("cpu"), asleep_nbytes=0,
        derived_nbytes=0, relocatable=True, processing=None,
    )  # fmt: skip
    Mistake(
        make=lambda: place.choose_place(model, [], 1, host=False), error=ShadowError, said="takes 1000 bytes, 10 are free",
        hint="Ask for mode in_place",
    ).play()  # fmt: skip


def test_no_descriptors_for_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []

    def few(flags: int) -> tuple[int, int]:
        if opened:
            raise OSError(24, "Too many open files")
        opened.extend(make(flags))
        return opened[0], opened[1]

    make = os.pipe2
    with monkeypatch.context() as patch:
        patch.setattr("weightcast.transports.window_pipes.os.pipe2", few)
        Mistake(make=WindowPipes.make, error=TransportError, said="no pipe to a worker", hint="ulimit -n").play()
    for descriptor in opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
    WindowPipes.make()[0].close()


def test_no_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("weightcast.transports.arena.os.posix_fallocate", full)
        Mistake(
            make=lambda: Arena(1 << 20), error=TransportError, said="no 1 MiB of shared memory for the weights",
            hint="Raise the limits of the trainer .*or use another transport",
        ).play()  # fmt: skip
    Arena(1 << 20).close()
