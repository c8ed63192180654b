"""What this process says about itself so that the other side can choose a transport."""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import uuid
from collections.abc import Iterable
from pathlib import Path

import torch

from weightcast.layout.memory import FileSpan
from weightcast.transports.base import Facts
from weightcast.transports.files import checkpoint_roots
from weightcast.transports.registry import registry

_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Settings of torch's allocator, the one that counts first."""
RDMA_DEVICES = "/sys/class/infiniband"


def local_facts(
    device: torch.device | str, address: str | None = None, *, files: Iterable[FileSpan | None] = ()
) -> Facts:
    """Return the facts of this process for weights on ``device``, some of which may be parts of ``files``. ``address`` replaces the
    address at which other hosts reach this process."""
    device = torch.device(device)
    return Facts(
        host=host_identity(),
        pid=os.getpid(),
        device=device.type,
        gpu=gpu_uuid(device) if device.type == "cuda" else "",
        visible_gpus=visible_gpus() if device.type == "cuda" else (),
        mappable=device.type != "cuda" or memory_is_mappable(),
        nccl_host=os.environ.get("NCCL_HOSTID", host_identity()) if device.type == "cuda" else "",
        rdma=has_rdma(),
        transports=registry().available(),
        folders=tuple(sorted({os.path.dirname(file.path) for file in files if file is not None})),
        roots=checkpoint_roots(),
        address=address or outward_address(),
    )


def host_identity() -> str:
    """Return a text that is equal for processes that can map each other's memory: one boot, one /dev/shm, one process table, one user.

    Containers on one machine have different texts unless the containers share their IPC and process namespaces.
    """
    parts = [_boot_id(), _inode("/dev/shm"), _inode("/proc/self/ns/pid"), str(os.geteuid())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def outward_address() -> str:
    """Return the address of the interface through which other hosts are reached; the loopback address when there is none."""
    # Connecting a datagram socket picks a route and sends nothing; the addresses are reserved for documentation.
    for family, target in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((target, 9))
                return str(probe.getsockname()[0])
        except OSError:
            continue
    return "127.0.0.1"


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{platform.node()}-{uuid.getnode():x}"


def _inode(path: str) -> str:
    try:
        stat = os.stat(path)
    except OSError:
        return "none"
    return f"{stat.st_dev}:{stat.st_ino}"


def has_rdma() -> bool:
    """Whether the system has RDMA devices that this process sees."""
    try:
        return bool(os.listdir(RDMA_DEVICES))
    except OSError:
        return False


def gpu_uuid(device: torch.device) -> str:
    """Return the name that a GPU has in all processes of a host, whatever number each process gives the GPU."""
    return str(torch.cuda.get_device_properties(device).uuid)


def visible_gpus() -> tuple[str, ...]:
    """Return the UUIDs of this process's GPUs, in this process's order."""
    return tuple(gpu_uuid(torch.device("cuda", index)) for index in range(torch.cuda.device_count()))


def memory_is_mappable() -> bool:
    """Whether torch gets GPU memory in a way that other processes can map, as the environment says: all but cudaMallocAsync.

    A program may also choose its allocator itself; that shows when its memory is exported.
    """
    settings = next((os.environ[name] for name in _ALLOCATOR_VARIABLES if os.environ.get(name)), "")
    return "backend:cudaMallocAsync" not in settings.replace(" ", "").split(",")
