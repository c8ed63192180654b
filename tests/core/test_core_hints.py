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
    ProtocolError,
    ShadowError,
    StateError,
    TransportError,
    Unsupported,
)
from weightcast.facts import Facts
from weightcast.manifest import Manifest, TensorSpec
from weightcast.messages import Heartbeat, decode, encode
from weightcast.receiver import place
from weightcast.trainer.fleet.numbers import Numbers
from weightcast.transports.buckets import check_bucket_nbytes
from weightcast.transports.guard import EndGuard
from weightcast.transports.registry import registry
from weightcast.transports.rendezvous import Listener
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
