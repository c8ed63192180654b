"""Arenas: who can read them, who can write them, and what a forked child has of them."""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import multiprocessing
import os
from multiprocessing.connection import Connection

import pytest
import torch

from weightcast.errors import NotShared, PeerLost, TransportError
from weightcast.layout.memory import own_storage
from weightcast.transports import arena
from weightcast.transports.arena import Arena, map_arena

NBYTES = 3 * 2**20 + 17


def filled() -> tuple[Arena, torch.Tensor]:
    made = Arena(NBYTES)
    values = torch.randint(0, 256, (NBYTES,), dtype=torch.uint8)
    made.bytes.copy_(values)
    return made, values


def test_nobody_else_writes_or_resizes_an_arena() -> None:
    """Not even a process of the same user that finds the descriptor, and opens it as root could."""
    made, values = filled()
    path = f"/proc/{os.getpid()}/fd/{made.ref.descriptor}"
    assert os.stat(path).st_mode & 0o777 == 0o400
    os.fchmod(made.ref.descriptor, 0o600)
    descriptor = os.open(path, os.O_RDWR)
    try:
        for attempt in (
            lambda: mmap.mmap(descriptor, NBYTES, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
            lambda: os.pwrite(descriptor, b"x", 5),
            lambda: os.ftruncate(descriptor, 5),
            lambda: os.ftruncate(descriptor, 2 * NBYTES),
            lambda: fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, 0),
        ):
            with pytest.raises(OSError, match="not permitted"):
                attempt()
    finally:
        os.close(descriptor)
    assert torch.equal(map_arena(made.ref), values)
    made.bytes[5] = 255 - values[5]
    assert torch.equal(map_arena(made.ref), made.bytes)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_another_user_cannot_open_an_arena() -> None:
    made, values = filled()

    def nobody() -> str:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        with pytest.raises(NotShared) as caught:
            map_arena(made.ref)
        return str(caught.value)

    assert "cannot open the shared memory" in str(in_child(nobody))
    assert torch.equal(map_arena(made.ref), values)


def test_a_kernel_that_cannot_seal_against_writing_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = fcntl.fcntl

    def old_kernel(descriptor: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_ADD_SEALS and argument & 0x10:
            raise OSError(errno.EINVAL, "Invalid argument")
        return int(real(descriptor, command, argument))

    monkeypatch.setattr(arena.fcntl, "fcntl", old_kernel)
    with caplog.at_level(logging.WARNING):
        made, values = filled()
    assert "F_SEAL_FUTURE_WRITE" in caplog.text
    assert os.fstat(made.ref.descriptor).st_mode & 0o777 == 0o400
    assert torch.equal(map_arena(made.ref), values)


def in_child(work: object, *args: object) -> object:
    """What a function says in a forked child."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def run(channel: Connection) -> None:
        channel.send(work(*args))  # type: ignore[operator]

    process = context.Process(target=run, args=(there,))
    process.start()
    assert here.poll(30)
    answer = here.recv()
    process.join(30)
    assert process.exitcode == 0
    return answer


@pytest.mark.parametrize("is_closed", [False, True])
def test_what_a_forked_child_writes_stays_in_the_child(is_closed: bool) -> None:
    """Also in a storage that is still used after its arena was closed and forgotten."""
    made, values = filled()
    part = torch.empty(0, dtype=torch.uint8).set_(own_storage(made.bytes, 4096, 5000))
    mapped = map_arena(made.ref)
    if is_closed:
        made.close()
        del made

    def child() -> tuple[bool, bool, bool]:
        same = torch.equal(part, values[4096:9096])
        part.copy_(255 - part)
        return same, torch.equal(part, 255 - values[4096:9096]), torch.equal(mapped, values)

    assert in_child(child) == (True, True, True)
    assert torch.equal(part, values[4096:9096])
    assert torch.equal(mapped, values)
    part.copy_(255 - part)
    assert torch.equal(mapped[4096:9096], part)


def test_a_child_of_a_child_has_what_the_child_wrote() -> None:
    made, values = filled()

    def grandchild() -> bool:
        made.bytes[:100] = 255 - made.bytes[:100]
        return torch.equal(made.bytes[:100], values[:100])

    def child() -> tuple[object, bool]:
        made.bytes[:100] = 255 - made.bytes[:100]
        return in_child(grandchild), torch.equal(made.bytes[:100], 255 - values[:100])

    assert in_child(child) == (True, True)
    assert torch.equal(made.bytes, values)


def test_a_closed_arena_is_not_found_and_goes_with_its_last_user() -> None:
    before = set(os.listdir("/proc/self/fd"))
    made, values = filled()
    ref, part = made.ref, torch.empty(0, dtype=torch.uint8).set_(own_storage(made.bytes, 0, 256))
    made.close()
    made.close()
    with pytest.raises(PeerLost):
        map_arena(ref)
    del made
    assert torch.equal(part, values[:256])
    del part
    assert set(os.listdir("/proc/self/fd")) == before


def test_what_the_system_refuses_is_a_transport_error(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.listdir("/proc/self/fd")

    def refuse(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("memfd_create", "posix_fallocate", "fchmod"):
        with monkeypatch.context() as patched:
            patched.setattr(arena.os, name, refuse)
            with pytest.raises(TransportError, match="No space left"):
                Arena(4096)
    assert os.listdir("/proc/self/fd") == before
