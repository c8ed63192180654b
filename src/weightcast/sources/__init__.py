"""Sources: a module, also with adapters of PEFT, a state dict, the shards of either on one rank of several, a safetensors checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import nn

from weightcast.errors import InvalidInput
from weightcast.sources.absent import refuse_absent
from weightcast.sources.adapter import AdapterSource
from weightcast.sources.adapters import refuse_unmerged
from weightcast.sources.base import Source
from weightcast.sources.conversions import checkpoint_tensors, read_module
from weightcast.sources.merged import MergedSource, merged_twin
from weightcast.sources.module import ModuleSource
from weightcast.sources.parts import Joined, PartsLike, as_one, folders_of, is_parts
from weightcast.sources.renaming import Rename
from weightcast.sources.safetensors import SafetensorsSource
from weightcast.sources.sharded import ShardedSource
from weightcast.sources.shards import is_distributed
from weightcast.sources.state_dict import StateDictSource
from weightcast.sources.streamed import Stream, StreamSource
from weightcast.sources.windowed import WindowedSource
from weightcast.sources.wrappers import ReadThrough, read_through

SourceLike = (
    Source
    | nn.Module
    | Mapping[str, torch.Tensor]
    | PartsLike
    | str
    | Path
    | StreamSource
    | Callable[[], Stream]
    | Stream
)


def make_source(
    source: SourceLike,
    *,
    dtype: torch.dtype | None = None,
    rename: Rename | None = None,
    keeps: bool = True,
    adapter: str | None = None,
) -> Source:
    """Make a Source of a module, a mapping of names to tensors, several of either by prefix, a checkpoint folder, a stream or a Source.

    Args:
        dtype: the type in which floating-point tensors are published, for modules, state dicts and streams. A checkpoint's files are
            published as they are, and a Source has its type already.
        rename: other names for checkpoint tensors (see renaming).
        keeps: False for a stream that another rank sends; the source then keeps no values.
        adapter: publish this LoRA adapter of a PEFT model by itself, and not merged weights.
    """
    if adapter is not None:
        if rename is not None:
            raise InvalidInput("rename has no effect on an adapter", field="rename", hint="Leave it out")
        return AdapterSource(source, adapter, dtype=dtype)
    folders = folders_of(source)
    if dtype is not None and (folders or isinstance(source, Source | str | Path)):
        raise InvalidInput(
            f"dtype has no effect on a {'Source' if isinstance(source, Source) else 'checkpoint folder'}",
            field="dtype",
            hint="Leave it out: engines cast to their own type where they hold another",
        )
    if isinstance(source, Source):
        if rename is not None:
            raise InvalidInput("rename has no effect on a Source", field="rename", hint="Rename what it is made of")
        return source
    if folders is not None:
        return SafetensorsSource(folders, rename=rename)
    if is_parts(source):
        source, rename = as_one(source, rename)
    if isinstance(source, nn.Module):
        if (twin := merged_twin(source)) is not None:
            return MergedSource(twin, make_source(twin.module, dtype=dtype, rename=rename))
        content = read_module(source).renamed(rename)
        if any(map(is_distributed, content.tensors.values())):
            return ShardedSource(content, dtype=dtype, module=source)
        return ModuleSource(source, dtype=dtype, names=content)
    if isinstance(source, Mapping):
        refuse_unmerged(source)
        given = cast("Mapping[str, torch.Tensor]", source)
        # Joined mappings have seen through the wrappers of each part; what a prefix is called tells no wrapper.
        own = {name: name for name in given} if isinstance(given, Joined) else None
        tensors = read_through(given, rename, names=own)
        made = _mapping_source(tensors, dtype)
        if isinstance(tensors, ReadThrough):
            tensors.first = None
        return made
    if isinstance(source, str | Path):
        return SafetensorsSource(source, rename=rename)
    if isinstance(source, StreamSource):
        return WindowedSource(source, dtype=dtype, rename=rename, keeps=keeps)
    if not isinstance(source, type) and (callable(source) or isinstance(source, Iterable)):
        return WindowedSource(StreamSource(source), dtype=dtype, rename=rename, keeps=keeps)
    raise InvalidInput(
        f"cannot publish a {type(source).__name__}; give a module, a state dict, a checkpoint folder or a stream",
        field="source",
    )


def _mapping_source(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> Source:
    refuse_absent(tensors)
    if any(map(is_distributed, tensors.values())):
        return ShardedSource(tensors, dtype=dtype)
    return StateDictSource(tensors, dtype=dtype)


__all__ = [
    "AdapterSource",
    "MergedSource",
    "ModuleSource",
    "Rename",
    "SafetensorsSource",
    "ShardedSource",
    "Source",
    "SourceLike",
    "StateDictSource",
    "Stream",
    "StreamSource",
    "WindowedSource",
    "checkpoint_tensors",
    "make_source",
]
