"""Room: how much more memory of the host this process may take before something is killed for it. Linux.

The kernel's own estimate counts the whole machine. Inside a container the limits of the process's control group, and of
every group around it, are usually smaller, and passing one of them ends a process at once. What a group holds of files is
given back on demand and counts as free, as it does in the kernel's estimate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True, slots=True)
class _Controller:
    """Names of one version of the memory controller."""

    mount: str
    limit: str
    used: str
    files: tuple[str, ...]


_V2 = _Controller("", "memory.max", "memory.current", ("inactive_file", "active_file"))
_V1 = _Controller(
    "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")
)


def host_room_nbytes(*, proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that are available to this process; None where the system does not tell."""
    available = _mem_available(proc)
    if available is None:
        return None
    return max(0, min([available, *_group_rooms(proc, cgroup)]))


def _mem_available(proc: Path) -> int | None:
    for line in _text(proc / "meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _group_rooms(proc: Path, cgroup: Path) -> Iterator[int]:
    """What is left of each limit above this process. Inside a container the path may be the host's and lead nowhere:
    what is mounted at the top is then the container's own group."""
    for line in _text(proc / "self" / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number == "0":
            controller = _V2
        elif "memory" in names.split(","):
            controller = _V1
        else:
            continue
        inner = PurePosixPath(path.lstrip("/"))
        for group in (inner, *inner.parents):
            room = _room(cgroup / controller.mount / group, controller)
            if room is not None:
                yield room


def _room(group: Path, controller: _Controller) -> int | None:
    limit, used = (_text(group / name).strip() for name in (controller.limit, controller.used))
    if not limit.isdecimal() or not used.isdecimal():  # "max", or not a group of this version
        return None
    pairs = (line.split() for line in _text(group / "memory.stat").splitlines())
    stat = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
    return int(limit) - int(used) + sum(stat.get(name, 0) for name in controller.files)


def _text(path: Path) -> str:
    """The file's text; empty when there is no such file or it may not be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
