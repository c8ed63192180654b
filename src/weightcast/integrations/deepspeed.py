"""DeepSpeed: a stream of whole tensors out of a module whose parameters ZeRO-3 has spread over the trainer's ranks.

from weightcast.integrations.deepspeed import gathered
publisher = Publisher(lambda: gathered(engine.module), engines, process_group=torch.distributed.group.WORLD)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from weightcast.integrations.plug_points import plug_point
from weightcast.sources.wrappers import plain_names, unwrapped


def gathered(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and whole tensors of a module, under the names of its state dict: what one layer has is gathered, and let go of when the
    iterator goes on to the next layer. Every rank has to read the iterator to its end, as gathering is collective.

    A module that ZeRO-3 does not have is read where it lies, and DeepSpeed is not needed for it.
    """
    module, seen = unwrapped(module), set[int]()
    names = plain_names(module, [name for name, _ in (*module.named_parameters(), *module.named_buffers())])
    for prefix, layer in module.named_modules():
        own = {name: value for name, value in layer.named_parameters(recurse=False) if id(value) not in seen}
        seen.update(map(id, own.values()))
        buffers = {
            name: value
            for name, value in layer.named_buffers(recurse=False)
            if name not in layer._non_persistent_buffers_set
        }
        with _whole(list(own.values())):
            for name, value in (own | buffers).items():
                yield names[f"{prefix}.{name}" if prefix else name], value.data


def _whole(parameters: list[nn.Parameter]) -> Any:
    spread = [parameter for parameter in parameters if hasattr(parameter, "ds_shape")]
    if not spread:
        return nullcontext()
    gather = plug_point("deepspeed.runtime.zero:GatheredParameters", package="deepspeed", wanted="deepspeed>=0.16")
    return gather(spread)
