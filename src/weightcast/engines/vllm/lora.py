"""Everything of vLLM's LoRA manager that weightcast relies on, in one place: a worker's registered adapters, and its model without them.

vLLM wraps the layers that adapters may change, and the wrapped layers stay the model's own under another name. An adapter that is
registered and pinned is never read from a path: a request that names its number finds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from weightcast.engines.stock.layers import own_tensors
from weightcast.errors import LoadError, Unsupported
from weightcast.manifest.adapters import AdapterConfig, factor_names

Shape = tuple[int, int]
"""Inputs and outputs of a linear layer."""


class LoraManager:
    """The LoRA manager of one vLLM worker. Calls come between two steps, on the worker's thread, but for ``build``."""

    def __init__(self, worker: Any) -> None:
        self._manager = worker.model_runner.lora_manager
        self._models = self._manager._adapter_manager
        self._config = self._manager.lora_config
        self._mapper = _renaming(self._models.model)
        self._ours: dict[int, Any] = {}
        self._keep_through_resets()

    @property
    def capacity(self) -> int:
        """How many adapters of whatever origin can be registered."""
        return int(self._models.capacity)

    @property
    def max_rank(self) -> int:
        return int(self._config.max_lora_rank)

    @property
    def device(self) -> torch.device:
        return torch.device(self._manager.device)

    @property
    def num_others(self) -> int:
        """Registered adapters that somebody else brought."""
        return sum(number not in self._ours for number in self._models.list_adapters())

    def layer_name(self, module: str) -> str:
        """vLLM's name for a module of the checkpoint."""
        from vllm.lora.utils import parse_fine_tuned_lora_name

        name, _ = parse_fine_tuned_lora_name(factor_names(module)[0], self._mapper)
        return str(name)

    def shapes(self) -> dict[str, Shape]:
        """The linear layers that an adapter can change, whole and by the names that ``layer_name`` gives."""
        found = dict[str, Shape]()
        for name, layer in self._models.modules.items():
            sizes = _outputs_of(layer)
            parts = self._models.packed_modules.get(name) or [name]
            if len(sizes) == len(parts):
                found |= {
                    part: (int(layer.base_layer.input_size), int(size)) for part, size in zip(parts, sizes, strict=True)
                }
        return found

    def build(self, config: AdapterConfig, matrices: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Any:
        """Make an adapter of copies of these matrices, beside whatever runs. LoadError where vLLM makes something else of them."""
        from vllm.lora.peft_helper import PEFTHelper

        helper = PEFTHelper.from_dict(
            {
                "r": config.r,
                "lora_alpha": config.lora_alpha,
                "use_rslora": config.use_rslora,
                "target_modules": list(config.target_modules),
            }
        )
        layers = dict[str, Any]()
        for module, (a, b) in matrices.items():
            # vLLM scales B where it lies.
            copies = dict(zip(factor_names(module), (a.clone(), b.clone()), strict=True))
            made = self._made(copies, helper)
            if len(made) != 1:
                raise LoadError(f"vLLM makes {len(made)} layers of the adapter's matrices for {module!r}")
            for name, layer in made.items():
                layer.rank, layer.scaling = a.shape[0], config.scaling_of(module)
                layers[name] = layer
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # steps run on another stream
        return self._manager._lora_model_cls(1, config.r, layers)

    def add(self, number: int, adapter: Any) -> None:
        """Register an adapter under a number. Room for it was counted."""
        adapter.id = number
        self._ours[number] = adapter
        self._put(adapter)

    def remove(self, number: int) -> None:
        """Forget an adapter that no request names."""
        del self._ours[number]
        self._models.remove_adapter(number)

    def is_taken(self, number: int) -> bool:
        return number in self._models.list_adapters()

    def _made(self, tensors: dict[str, torch.Tensor], helper: Any) -> dict[str, Any]:
        try:
            made = self._manager._lora_model_cls.from_lora_tensors(
                lora_model_id=1,
                tensors=tensors,
                peft_helper=helper,
                device=str(self.device),
                dtype=self._config.lora_dtype,
                model_vocab_size=self._manager.vocab_size,
                weights_mapper=self._mapper,
                skip_prefixes=getattr(self._models.model, "lora_skip_prefixes", None),
            )
        except Exception as error:
            raise LoadError(f"vLLM refuses the adapter: {type(error).__name__}: {error}") from error
        layers: dict[str, Any] = made.loras
        return layers

    def _put(self, adapter: Any) -> None:
        """Register, and move the matrices to where a step reads them if a place is free there; otherwise a step does that itself."""
        self._models.add_adapter(adapter)
        self._models._registered_adapters.pin(adapter.id)
        if None in self._models.lora_index_to_id:
            self._models.activate_adapter(adapter.id)

    def _keep_through_resets(self) -> None:
        """vLLM drops all adapters when it is told that base weights were replaced. Ours are told by their trainer when they change."""
        remove_all = self._manager.remove_all_adapters

        def removed() -> None:
            remove_all()
            for adapter in self._ours.values():
                self._put(adapter)

        self._manager.remove_all_adapters = removed


def _renaming(model: nn.Module) -> Any:
    """vLLM's map from a checkpoint's names to its own, for adapters; None where names are the same."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    return None if mapper is None else mapper.get_rename_mapper()


def _outputs_of(layer: Any) -> list[int]:
    """The outputs of each part of a wrapped linear layer over all workers; none for a layer of another kind."""
    from vllm.model_executor.layers.linear import LinearBase, MergedColumnParallelLinear, QKVParallelLinear

    base = getattr(layer, "base_layer", None)
    if not isinstance(base, LinearBase):
        return []
    if isinstance(base, QKVParallelLinear):
        heads, shared = base.total_num_heads, base.total_num_kv_heads
        return [heads * base.head_size, shared * base.head_size, shared * base.v_head_size]
    if isinstance(base, MergedColumnParallelLinear):
        return list(base.output_sizes)
    return [base.output_size]


def without_adapters(model: nn.Module) -> nn.Module:
    """The model as its own loader knows it: vLLM's wrappers are left out, layers are the same objects under their former names.

    The model itself is not changed; modules above a wrapped layer are stood for by copies that share all else. Unsupported where such
    a module has weights of its own, which a copy would not hear of.
    """
    from vllm.lora.layers import BaseLayerWithLoRA

    plain = dict[int, nn.Module]()

    def of(module: nn.Module) -> nn.Module:
        while isinstance(module, BaseLayerWithLoRA):
            module = module.base_layer
        if id(module) not in plain:
            inner = {name: child if child is None else of(child) for name, child in module._modules.items()}
            same = all(inner[name] is child for name, child in module._modules.items())
            plain[id(module)] = module if same else _copy_with(module, inner)
        return plain[id(module)]

    return of(model)


def _copy_with(module: nn.Module, inner: Mapping[str, nn.Module | None]) -> nn.Module:
    if own_tensors(module) or hasattr(module, "process_weights_after_loading"):
        raise Unsupported(
            f"weights cannot be transferred to a model of this kind beside LoRA: {type(module).__name__} keeps weights of its own above "
            "a layer that adapters may change",
            hint="Start vLLM without --enable-lora, or publish adapters only",
        )
    copy: nn.Module = object.__new__(type(module))
    copy.__dict__ = {**module.__dict__, "_modules": dict(inner)}
    copy.__dict__.pop("lora_manager", None)
    return copy
