"""Two network namespaces joined by a cable that can be pulled: for tests of engines on other hosts. Linux, root, iproute2."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import subprocess
from pathlib import Path
from types import TracebackType

CLONE_NEWNET = 0x40000000


def obstacle() -> str | None:
    """Why networks cannot be made here; None when they can."""
    if os.geteuid() != 0:
        return "needs root"
    if shutil.which("ip") is None:
        return "needs ip (iproute2)"
    name = f"{_prefix(os.getpid())}{secrets.token_hex(2)}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return "this system allows no network namespaces"
    made = subprocess.run(
        ["ip", "link", "add", f"{name}a", "type", "veth", "peer", "name", f"{name}b"], capture_output=True, check=False
    )
    if not made.returncode:
        subprocess.run(["ip", "link", "del", f"{name}a"], check=False)
    subprocess.run(["ip", "netns", "del", name], check=False)
    return None if not made.returncode else "this system has no veth devices"


def enter(netns: str) -> None:
    """Move the calling thread, and the threads that it starts from now on, into a network namespace."""
    descriptor = os.open(f"/run/netns/{netns}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(descriptor, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter network namespace {netns}")
    finally:
        os.close(descriptor)


class Cable:
    """A namespace ``netns`` and a cable to it: this side has address ``here``, the other ``there``. Gone when the context ends."""

    def __init__(self) -> None:
        self.netns = f"{_prefix(os.getpid())}{secrets.token_hex(2)}"
        self._device = f"{self.netns}a"
        # One of 32,768 networks of four addresses in 198.18.0.0/15, which is set apart for tests.
        network = secrets.randbelow(2**15) << 2
        self.here, self.there = (
            f"198.{18 + (host >> 16)}.{host >> 8 & 255}.{host & 255}" for host in (network + 1, network + 2)
        )

    def __enter__(self) -> Cable:
        inside, far = ["ip", "netns", "exec", self.netns], f"{self.netns}b"
        _run("ip", "netns", "add", self.netns)
        _run("ip", "link", "add", self._device, "type", "veth", "peer", "name", far)
        _run("ip", "link", "set", far, "netns", self.netns)
        _run("ip", "addr", "add", f"{self.here}/30", "dev", self._device)
        _run("ip", "link", "set", self._device, "up")
        _run(*inside, "ip", "addr", "add", f"{self.there}/30", "dev", far)
        _run(*inside, "ip", "link", "set", far, "up")
        _run(*inside, "ip", "link", "set", "lo", "up")
        return self

    def pull(self) -> None:
        """Nothing passes from now on, and nobody is told."""
        _run("ip", "link", "set", self._device, "down")

    def plug_in(self) -> None:
        """Everything passes again; connections that were not given up go on."""
        _run("ip", "link", "set", self._device, "up")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        subprocess.run(["ip", "link", "del", self._device], check=False, capture_output=True)
        subprocess.run(["ip", "netns", "del", self.netns], check=False, capture_output=True)


def remove_networks_of(pid: int) -> None:
    """Remove the namespaces of a process that was killed; their cables go with them."""
    for path in Path("/run/netns").glob(f"{_prefix(pid)}*"):
        subprocess.run(["ip", "netns", "del", path.name], check=False, capture_output=True, timeout=10)


def _prefix(pid: int) -> str:
    """How the namespaces of a process begin. A device's name has at most 15 characters."""
    return f"wc{pid:x}-"


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=10)
