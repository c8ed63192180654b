"""weightcast verify: are an engine's live weights those of a checkpoint? Compares digests computed at both ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from weightcast.cli.shared import TimeoutOption, TokenOption, console, reported_errors
from weightcast.errors import EngineError, InvalidInput, Unsupported

if TYPE_CHECKING:
    from weightcast.deadline import Deadline
    from weightcast.trainer.clients.http import HttpEngineClient
    from weightcast.trainer.sources.safetensors import SafetensorsSource

SHOWN = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Tensors by how live values compare with the checkpoint's, in the type that they have in the engine."""

    version: str
    equal: tuple[str, ...] = ()
    different: tuple[str, ...] = ()
    unproven: Mapping[str, str] = field(default_factory=dict)
    """Tensors whose live values could not be compared, and why."""
    unused: tuple[str, ...] = ()
    """The checkpoint's tensors that the engine does not hold."""

    @property
    def proven(self) -> bool:
        """Every tensor that the engine holds was compared just now, and is equal."""
        return bool(self.equal) and not self.different and not self.unproven


def command(
    url: Annotated[str, typer.Argument(help="URL of the engine's server.")],
    checkpoint: Annotated[Path, typer.Option(help="Folder with safetensors files.", exists=True, file_okay=False)],
    token: TokenOption = None,
    timeout: TimeoutOption = 120.0,
) -> None:
    """Compare an engine's live weights with CHECKPOINT. Exit status 1 unless they are proven equal."""
    from weightcast.deadline import Deadline
    from weightcast.digest import LayoutDigest
    from weightcast.trainer.clients.http import HttpEngineClient
    from weightcast.trainer.sources.safetensors import SafetensorsSource

    with reported_errors():
        deadline = Deadline(timeout)
        client, source = HttpEngineClient(url, token=token), SafetensorsSource(checkpoint)
        try:
            committed = client.status(deadline).get("digest")
            comparison = compare(client, source, deadline)
            whole = f"{LayoutDigest(source.manifest, source.layout).of(source.memory):016x}"
        finally:
            source.close()
            client.close()
    out = console()
    out.print(f"{url} serves {comparison.version}", highlight=False, soft_wrap=True)
    out.print(
        f"digest that the live version was committed with {committed or '(none)'}, of the checkpoint {whole}",
        highlight=False,
        soft_wrap=True,
    )
    _print(comparison, out)
    out.print("[green]equal[/green]" if comparison.proven else "[bold red]not proven equal[/bold red]")
    if not comparison.proven:
        raise typer.Exit(1)


def compare(client: HttpEngineClient, source: SafetensorsSource, deadline: Deadline) -> Comparison:
    """Have the engine digest what it holds, and digest the same of the checkpoint.

    An engine that does not know where checkpoint tensors lie lists its live tensors instead: only those of the same name and
    type can be compared then, and the others are not proven.
    """
    try:
        answer = client.tensor_digests(source.manifest, deadline)
    except Unsupported:
        return _by_name(client, source, deadline)
    tensors = answer.get("tensors")
    if not isinstance(tensors, dict) or not all(isinstance(entry, dict) for entry in tensors.values()):
        raise EngineError("the engine gives no digests of its live tensors", engine=client.name)
    equal, different, unproven = [], [], {}
    for name, entry in tensors.items():
        if name not in source.manifest or not entry.get("digest"):
            unproven[name] = str(entry.get("reason") or "not a tensor of the checkpoint")
        elif entry["digest"] == _digest(source, name, str(entry.get("dtype")), deadline):
            equal.append(name)
        else:
            different.append(name)
    return Comparison(
        version=str(answer.get("weight_version")),
        equal=tuple(equal),
        different=tuple(different),
        unproven=unproven,
        unused=tuple(spec.name for spec in source.manifest.tensors if spec.name not in tensors),
    )


def _by_name(client: HttpEngineClient, source: SafetensorsSource, deadline: Deadline) -> Comparison:
    status = client.checksums(deadline)
    details = status.get("details")
    live: Any = details.get("checksums") if isinstance(details, dict) else None
    if not isinstance(live, dict) or not live:
        raise EngineError("the engine gives no checksums of its live tensors", engine=client.name)
    known = [name for name in live if name in source.manifest]
    expected = {name: _digest(source, name, source.manifest[name].dtype, deadline) for name in known}
    return Comparison(
        version=str(status.get("weight_version")),
        equal=tuple(name for name in known if live[name] == expected[name]),
        different=tuple(name for name in known if live[name] != expected[name]),
        unproven={name: "the checkpoint has no tensor of this name" for name in live if name not in source.manifest},
        unused=tuple(spec.name for spec in source.manifest.tensors if spec.name not in live),
    )


def _digest(source: SafetensorsSource, name: str, dtype: str, deadline: Deadline) -> str:
    """Hex digest of one tensor of the checkpoint, cast as the engine's loader casts it."""
    from weightcast.digest import digest_tensor
    from weightcast.dtypes import dtype_of

    deadline.check("digesting the checkpoint")
    values = source.tensor(name)
    try:
        return f"{digest_tensor(values.to(dtype_of(dtype))):016x}"
    except InvalidInput:
        raise EngineError(f"the engine holds {name} in an unknown type, {dtype[:40]!r}") from None


def _print(comparison: Comparison, out: Console) -> None:
    out.print(f"{len(comparison.equal)} tensors equal, {len(comparison.different)} different", highlight=False)
    unproven = [f"{name} ({reason})" for name, reason in comparison.unproven.items()]
    for title, names in (
        ("different", comparison.different),
        ("not compared", unproven),
        ("in the checkpoint, not held by the engine", comparison.unused),
    ):
        for name in names[:SHOWN]:
            out.print(f"  {title}: {name}", highlight=False, markup=False, soft_wrap=True)
        if len(names) > SHOWN:
            out.print(f"  {title}: {len(names) - SHOWN} more", highlight=False)
