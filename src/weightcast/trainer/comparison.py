"""Comparison: what is live in an engine beside a checkpoint, by digests computed at both ends."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from weightcast.content.layout_digest import LayoutDigest, digest_tensor
from weightcast.deadline import Deadline
from weightcast.errors import EngineError, InvalidInput, Unsupported
from weightcast.manifest.dtypes import dtype_of
from weightcast.manifest.names import matching
from weightcast.sources.safetensors import SafetensorsSource
from weightcast.trainer.clients.http import HttpEngineClient
from weightcast.trainer.fleet.places import is_computed, partner_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Tensors by how live values compare with the checkpoint's, in the type that they have in the engine."""

    version: str
    equal: tuple[str, ...] = ()
    different: tuple[str, ...] = ()
    unproven: Mapping[str, str] = field(default_factory=dict)
    """Tensors whose live values could not be compared, and why."""
    absent: tuple[str, ...] = ()
    """The checkpoint's tensors that the engine does not hold and should."""
    unused: tuple[str, ...] = ()
    """Those that it does not hold and rightly does without."""
    content: str = ""
    """The digest of the whole checkpoint in its own types: that of a report of its publication."""
    is_cast: bool = False
    """Whether the engine holds a tensor in another type than the checkpoint."""
    live: Mapping[str, str] = field(default_factory=dict)
    """Type and digest of each live tensor, by the checkpoint's names."""
    checkpoint: Mapping[str, str] = field(default_factory=dict)
    """The same of the checkpoint's tensors that the engine should hold, cast to the types that they have there."""

    @property
    def digests(self) -> tuple[str, str]:
        """One digest of all that is live and one of the same of the checkpoint, both in the engine's types: they are equal exactly where
        all tensors are."""
        return _digest_of(self.live), _digest_of(self.checkpoint)

    @property
    def proven(self) -> bool:
        """Every tensor that the engine should hold was compared just now, and is equal."""
        return bool(self.equal) and not self.different and not self.unproven and not self.absent


def compare(
    client: HttpEngineClient,
    source: SafetensorsSource,
    deadline: Deadline,
    unused: Sequence[str] = (),
    keep: Collection[str] = (),
) -> Comparison:
    """Have the engine digest what it holds, and digest the same of the checkpoint; ``unused`` are patterns of tensors that it may
    rightly not hold, and ``keep`` the parts of it that have other weights than the checkpoint's.

    An engine that does not know where checkpoint tensors lie lists its live tensors instead: only those of the same name and
    type can be compared then, and the others are not proven. Where an engine with tied weights holds one tensor for two, the
    checkpoint's have to be equal.
    """
    try:
        answer = client.tensor_digests(source.manifest, deadline)
    except Unsupported:
        return _by_name(client, source, deadline, unused)
    tensors = answer.get("tensors")
    if not isinstance(tensors, dict) or not all(isinstance(entry, dict) for entry in tensors.values()):
        raise EngineError("the engine gives no digests of its live tensors", engine=client.name)
    unproven, live = {}, {}
    kept = {f"{part}." for part in keep}
    for name, entry in tensors.items():
        if name in kept and name not in source.manifest:
            continue
        if name not in source.manifest or not entry.get("digest"):
            unproven[name] = str(entry.get("reason") or "not a tensor of the checkpoint")
        else:
            live[name] = f"{entry.get('dtype')} {entry['digest']}"
    found = _compared(source, str(answer.get("weight_version")), live, unproven, deadline)
    return _with_the_rest(source, tensors, found, unused, deadline)


def _compared(
    source: SafetensorsSource, version: str, live: dict[str, str], unproven: Mapping[str, str], deadline: Deadline
) -> Comparison:
    """What is found of live tensors (type and digest by name) that the checkpoint has, too."""
    checkpoint = {name: _digest(source, name, held.split()[0], deadline) for name, held in live.items()}
    return Comparison(
        version=version,
        equal=tuple(name for name in live if live[name] == checkpoint[name]),
        different=tuple(name for name in live if live[name] != checkpoint[name]),
        unproven=unproven,
        live=live | dict(unproven),
        checkpoint=checkpoint,
    )


def _with_the_rest(
    source: SafetensorsSource, held: Collection[str], found: Comparison, unused: Sequence[str], deadline: Deadline
) -> Comparison:
    """What was found of the tensors that the engine holds, and what becomes of the others."""
    missing = [spec for spec in source.manifest.tensors if spec.name not in held]
    left_out = matching(unused, [spec.name for spec in missing]) | {s.name for s in missing if is_computed(s)}
    placed = [spec for spec in source.manifest.tensors if spec.name in held]
    equal, different, absent, checkpoint = list(found.equal), list(found.different), [], dict(found.checkpoint)
    for spec in missing:
        if spec.name not in left_out:
            own = checkpoint[spec.name] = _digest(source, spec.name, spec.dtype, deadline)
            partner = partner_of(spec, placed)
            if partner is None:
                absent.append(spec.name)
            elif own != _digest(source, partner, spec.dtype, deadline):
                different.append(spec.name)
            elif partner in found.equal:
                equal.append(spec.name)
    return replace(
        found,
        equal=tuple(equal),
        different=tuple(different),
        absent=tuple(absent),
        unused=tuple(spec.name for spec in missing if spec.name in left_out),
        live={**found.live, **{name: checkpoint[name] for name in equal if name not in found.live}},
        checkpoint=checkpoint,
        content=_content(source, deadline),
        is_cast=any(said.split()[0] != source.manifest[name].dtype for name, said in checkpoint.items()),
    )


def _by_name(
    client: HttpEngineClient, source: SafetensorsSource, deadline: Deadline, unused: Sequence[str]
) -> Comparison:
    status = client.checksums(deadline)
    details = status.get("details")
    live: Any = details.get("checksums") if isinstance(details, dict) else None
    if not isinstance(live, dict) or not live:
        raise EngineError("the engine gives no checksums of its live tensors", engine=client.name)
    known = {name: f"{source.manifest[name].dtype} {live[name]}" for name in live if name in source.manifest}
    unproven = {name: "the checkpoint has no tensor of this name" for name in live if name not in source.manifest}
    found = _compared(source, str(status.get("weight_version")), known, unproven, deadline)
    return _with_the_rest(source, live, found, unused, deadline)


def _digest(source: SafetensorsSource, name: str, dtype: str, deadline: Deadline) -> str:
    """Type and hex digest of one tensor of the checkpoint, cast as the engine's loader casts it."""
    deadline.check("digesting the checkpoint")
    values = source.tensor(name)
    try:
        return f"{dtype} {digest_tensor(values.to(dtype_of(dtype))):016x}"
    except InvalidInput:
        raise EngineError(f"the engine holds {name} in an unknown type, {dtype[:40]!r}") from None


def _content(source: SafetensorsSource, deadline: Deadline) -> str:
    """Hex digest of all of the checkpoint, as it is published."""
    check = partial(deadline.check, "digesting the checkpoint")
    return f"{LayoutDigest(source.manifest, source.layout).of(source.memory, check):016x}"


def _digest_of(tensors: Mapping[str, str]) -> str:
    lines = "\n".join(f"{name} {said}" for name, said in sorted(tensors.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]
