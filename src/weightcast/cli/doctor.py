"""weightcast doctor: which transports and engines work on this machine, and why the others do not."""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from weightcast.cli.shared import JsonOption, console, print_json, print_table
from weightcast.deadline import MOST_S
from weightcast.errors import WeightcastError

State = Literal["ok", "note", "no"]

PACKAGES = ("weightcast", "torch", "transformers", "vllm", "sglang", "ray", "nccl4py", "nixl-cu13", "pyzmq", "msgspec")
MIN_OPEN_FILES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report. ``no``: does not work here; ``note``: works, or is merely absent, but worth knowing."""

    topic: str
    name: str
    state: State
    text: str


def command(
    transfer: Annotated[bool, typer.Option(help="Move bytes between two processes by each transport.")] = True,
    timeout: Annotated[float, typer.Option(min=1.0, max=MOST_S, help="Deadline of one transfer, in seconds.")] = 60.0,
    as_json: JsonOption = False,
) -> None:
    """Report what works on this machine. Exit status 1 when no transport does."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    out = console()
    with Console(stderr=True).status("looking"):
        found = list(findings(transfer=transfer, timeout_s=timeout))
    working = any(finding.topic == "transport" and finding.state == "ok" for finding in found)
    if as_json:
        print_json({"works": working, "findings": [asdict(finding) for finding in found]})
    else:
        print_table(out, _table(found))
        if not working:
            out.print("[bold red]no transport works on this machine[/bold red]")
    if not working:
        raise typer.Exit(1)


def _table(found: Sequence[Finding]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in found:
        mark = {"ok": Text("✓", "green"), "note": Text("·", "yellow"), "no": Text("✗", "red")}[finding.state]
        table.add_row(mark, finding.topic, Text(finding.name), Text(finding.text, overflow="fold"))
    return table


def findings(*, transfer: bool, timeout_s: float) -> Iterator[Finding]:
    """All findings, as they are made; each transport is tried in a process of its own when ``transfer`` is set."""
    yield from _machine()
    yield from _packages()
    yield from _transports(transfer, timeout_s)
    yield from _engines()


def _machine() -> Iterator[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding(
        topic="machine", name="python", state="ok", text=f"{platform.python_version()}, {platform.platform()}"
    )
    yield Finding(
        topic="machine", name="cpu", state="ok", text=f"{cores} cores, torch uses {torch.get_num_threads()} threads"
    )
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        yield Finding(topic="machine", name="cuda", state="ok", text=f"{torch.version.cuda}: {', '.join(names)}")
    else:
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        yield Finding(topic="machine", name="cuda", state="note", text=f"no device; {built}")
    yield _shared_memory()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    state: State = "ok" if soft == resource.RLIM_INFINITY or soft >= MIN_OPEN_FILES else "note"
    yield Finding(
        topic="machine", name="open files", state=state, text=f"limit {_limit(soft)} (ulimit -n), hard {_limit(hard)}"
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    text = f"limit {_limit(soft, 'bytes')} (ulimit -l), hard {_limit(hard, 'bytes')}; pinned memory counts against it"
    yield Finding(topic="machine", name="locked memory", state="ok", text=text)


def _shared_memory() -> Finding:
    """What shm needs: anonymous shared memory that other processes of the user open through /proc."""
    from weightcast.report.model import format_bytes
    from weightcast.room import host_room_nbytes

    if not hasattr(os, "memfd_create"):
        return Finding(topic="machine", name="memory", state="note", text="no memfd on this system: shm cannot work")
    room = host_room_nbytes()
    text = "shm keeps a second copy of the trainer's CPU weights only while it moves them, or mirrors a state dict"
    free = (
        "unknown how much is free" if room is None else f"{format_bytes(room)} free, the limits of containers counted"
    )
    return Finding(topic="machine", name="memory", state="ok" if room is not None else "note", text=f"{free}; {text}")


def _limit(value: int, unit: str = "") -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value} {unit}".strip()


def _packages() -> Iterator[Finding]:
    for name in PACKAGES:
        try:
            yield Finding(topic="package", name=name, state="ok", text=version(name))
        except PackageNotFoundError:
            yield Finding(topic="package", name=name, state="note", text="not installed")


def _transports(transfer: bool, timeout_s: float) -> Iterator[Finding]:
    from weightcast.transports.registry import registry

    names = registry().names()
    if not names:
        yield Finding(
            topic="transport", name="none", state="no", text="no transport is registered; reinstall weightcast"
        )
    for name in names:
        reason = registry().failure(name)
        if reason is not None:
            yield Finding(topic="transport", name=name, state="no", text=reason)
        elif transfer:
            yield _tried(name, timeout_s)
        else:
            yield Finding(topic="transport", name=name, state="ok", text="loads (not tried)")


def _tried(name: str, timeout_s: float) -> Finding:
    from weightcast.cli.roundtrip import try_transport
    from weightcast.report.model import format_bytes

    try:
        trip = try_transport(name, timeout_s=timeout_s)
    except WeightcastError as error:
        return Finding(topic="transport", name=name, state="no", text=error.message)
    rate = trip.nbytes / trip.seconds / 1e9
    text = f"{format_bytes(trip.nbytes)} to another process in {trip.seconds * 1e3:.1f} ms ({rate:.2f} GB/s), exact"
    return Finding(topic="transport", name=name, state="ok", text=text)


def _engines() -> Iterator[Finding]:
    yield _importable("embedded", "transformers", "weightcast.engines.embedded", "pip install 'weightcast[server]'")
    yield _importable("vllm", "vllm", "weightcast.engines.vllm", "pip install 'weightcast[vllm]'")
    yield _importable("sglang", "sglang", "weightcast.engines.sglang.plugin", "pip install 'weightcast[sglang]'")


def _importable(engine: str, package: str, module: str, hint: str) -> Finding:
    """Whether an engine's library imports here. Catches everything: a broken installation fails in any way it likes."""
    import importlib

    try:
        number = version(package)
    except PackageNotFoundError:
        return Finding(topic="engine", name=engine, state="note", text=f"{package} is not installed: {hint}")
    try:
        importlib.import_module(package)
        importlib.import_module(module)
    except Exception as error:  # noqa: BLE001
        return Finding(
            topic="engine", name=engine, state="no", text=f"{package} {number}: {type(error).__name__}: {error}"
        )
    return Finding(topic="engine", name=engine, state="ok", text=f"{package} {number}")
