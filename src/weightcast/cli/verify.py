"""weightcast verify: are an engine's live weights those of a checkpoint? Compares digests computed at both ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import httpx
import typer
from rich.console import Console

from weightcast.cli.shared import TimeoutOption, TokenOption, console, reported_errors
from weightcast.errors import AuthError, DeadlineExceeded, EngineError

SHOWN = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Live tensors by how they compare with the checkpoint's tensors of the same name."""

    equal: tuple[str, ...]
    different: tuple[str, ...]
    unknown: tuple[str, ...]
    """Live tensors that the checkpoint has not (an engine's own fused form, say)."""
    absent: tuple[str, ...]
    """Checkpoint tensors that the engine does not list (tied, or loaded into a fused tensor)."""


def command(
    url: Annotated[str, typer.Argument(help="URL of the engine's server.")],
    checkpoint: Annotated[Path, typer.Option(help="Folder with safetensors files.", exists=True, file_okay=False)],
    token: TokenOption = None,
    timeout: TimeoutOption = 120.0,
) -> None:
    """Compare an engine's live weights with CHECKPOINT. Exit status 1 unless they are proven equal."""
    with reported_errors():
        version, committed, live = _ask(url, token, timeout)
        digest, expected = checkpoint_digests(checkpoint)
    whole = committed is not None and committed == digest
    comparison = compare(live, expected)
    out = console()
    out.print(f"{url} serves {version}", highlight=False, soft_wrap=True)
    out.print(
        f"digest of the live version {committed or '(none)'}, of the checkpoint {digest}",
        highlight=False,
        soft_wrap=True,
    )
    _print(comparison, out)
    proven = not comparison.different and bool(comparison.equal) and (whole or not comparison.unknown)
    out.print("[green]equal[/green]" if proven else "[bold red]not proven equal[/bold red]")
    if not proven:
        raise typer.Exit(1)


def _ask(url: str, token: str | None, timeout_s: float) -> tuple[str, str | None, Mapping[str, str]]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    address = f"{url.rstrip('/')}/weightcast/status?checksums=true"
    try:
        reply = httpx.get(address, headers=headers, timeout=timeout_s, trust_env=False)
    except httpx.TimeoutException:
        raise DeadlineExceeded(f"no checksums in {timeout_s:g} s", engine=url) from None
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise EngineError(f"cannot be reached: {error}", engine=url, hint="Is the server running?") from None
    if reply.status_code == 401:
        raise AuthError("checksums need the server's token", engine=url, hint="Give --token, or set WEIGHTCAST_TOKEN")
    if reply.status_code != 200:
        raise EngineError(f"/weightcast/status answered {reply.status_code}: {reply.text[:200]}", engine=url)
    status = reply.json()
    checksums = status.get("details", {}).get("checksums")
    if not isinstance(checksums, dict) or not checksums:
        raise EngineError("the engine gives no checksums of its live tensors", engine=url)
    return str(status.get("weight_version")), status.get("digest"), checksums


def checkpoint_digests(folder: Path) -> tuple[str, dict[str, str]]:
    """Hex digest of the whole checkpoint, in the order of its files, and of each tensor by itself."""
    from weightcast.digest import LayoutDigest, digest_tensor
    from weightcast.trainer.sources.safetensors import SafetensorsSource

    source = SafetensorsSource(folder)
    try:
        whole = LayoutDigest(source.manifest, source.layout).of(source.memory)
        tensors = {}
        for place in source.layout.placements:
            values = source.memory.view(place.storage, place.dtype, place.offset, place.region.sizes, place.strides)
            tensors[place.region.name] = f"{digest_tensor(values):016x}"
    finally:
        source.close()
    return f"{whole:016x}", tensors


def compare(live: Mapping[str, str], expected: Mapping[str, str]) -> Comparison:
    """Sort tensors by how they compare; both map names to hex digests."""
    common = [name for name in live if name in expected]
    return Comparison(
        equal=tuple(name for name in common if live[name] == expected[name]),
        different=tuple(name for name in common if live[name] != expected[name]),
        unknown=tuple(name for name in live if name not in expected),
        absent=tuple(name for name in expected if name not in live),
    )


def _print(comparison: Comparison, out: Console) -> None:
    out.print(f"{len(comparison.equal)} tensors equal, {len(comparison.different)} different", highlight=False)
    for title, names in (
        ("different", comparison.different),
        ("live, not in the checkpoint under this name", comparison.unknown),
        ("in the checkpoint, not live under this name", comparison.absent),
    ):
        for name in names[:SHOWN]:
            out.print(f"  {title}: {name}", highlight=False, markup=False, soft_wrap=True)
        if len(names) > SHOWN:
            out.print(f"  {title}: {len(names) - SHOWN} more", highlight=False)
