"""Everything of vLLM's model loading that weightcast relies on, in one place: the layerwise reload and its metadata.

The reload keeps, for each layer, what its parameters looked like when the model was built: the *load format*, in which
checkpoint tensors are taken. After loading, a layer may have another, *live* format (packed, quantised, transposed).
"""

from __future__ import annotations

import copy
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from weightcast.engines.stock.layers import own_tensors
from weightcast.engines.vllm.drafts import Draft
from weightcast.engines.vllm.versions import SUPPORTED
from weightcast.errors import Unsupported

try:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
    from vllm.model_executor.model_loader.reload.layerwise import (
        _get_original_loader,
        _place_kernel_tensors,
        get_layerwise_info,
    )
    from vllm.model_executor.model_loader.reload.meta import SKIP_TENSORS
    from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs
    from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
    from vllm.utils.torch_utils import set_default_torch_dtype
except ImportError as error:
    raise Unsupported(f"this vLLM has no layerwise reload: {error}", hint=SUPPORTED.hint) from error

HELPERS = "vllm."
"""How the names of vLLM's modules begin (see engines.stock.reach)."""
NOT_RELOADED = frozenset(SKIP_TENSORS)
"""Tensors of layers that a reload leaves alone."""
PROCESSING = ("vllm.model_executor.", "compressed_tensors.")
"""How the names of the modules begin whose objects process weights after loading."""
RELOAD_LOGGER = "vllm.model_executor.model_loader.reload.layerwise"


def load_format(layer: nn.Module) -> dict[str, torch.Tensor]:
    """Return the layer's own parameters and buffers as they were built: on the meta device, with their weight loaders."""
    parameters, buffers = get_layerwise_info(layer).restore_metadata
    return {**parameters, **buffers}


def stand_in(meta: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """Return a tensor of the load format in zeroed memory, for a loader that only records. The memory is reserved and never touched."""
    return dressed(zeros_like(meta, torch.device("cpu")), meta, layer)


def zeros_like(meta: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return zeros of the form of a tensor on the meta device."""
    extent = sum((size - 1) * stride for size, stride in zip(meta.shape, meta.stride(), strict=True)) + 1
    flat = torch.zeros(extent if meta.numel() else 0, dtype=meta.dtype, device=device)
    return flat.as_strided(tuple(meta.shape), tuple(meta.stride()))


def dressed(tensor: torch.Tensor, meta: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """Give a tensor the class and the attributes that a layer's tensor was built with. Returns the same tensor."""
    tensor.__class__ = meta.__class__
    tensor.__dict__ = meta.__dict__.copy()
    tensor.requires_grad_(False)
    restore_layer_refs(tensor, layer)
    _unwrap(tensor)
    return tensor


def _unwrap(tensor: torch.Tensor) -> None:
    """Take a reload's wrapper off a weight loader: it would count tensors for a reload that is over."""
    loader = _get_original_loader(tensor)
    if hasattr(tensor, "weight_loader") and tensor.weight_loader is not loader:
        tensor.weight_loader = loader


def derives_weights(layer: nn.Module) -> bool:
    """Whether the layer computes more weights out of those of the layers below it (MLA does)."""
    return hasattr(layer, "process_weights_after_loading") and not isinstance(layer, Attention)


def quant_method(layer: nn.Module) -> Any:
    """Return the layer's quantisation method, which plain linear layers have as well; None for other modules."""
    method = getattr(layer, "quant_method", None)
    return method if isinstance(method, QuantizeMethodBase) else None


def has_defaults(layer: nn.Module) -> bool:
    """Whether a checkpoint may lack tensors that the layer registers. The scales of a quantised cache of keys and values are such
    tensors."""
    return isinstance(quant_method(layer), BaseKVCacheMethod)


def padding_nbytes(tensor: torch.Tensor) -> int:
    """Return how many bytes of a parameter no checkpoint fills. The layer that made the parameter declares this number."""
    return int(tensor.numel() - getattr(tensor, "weight_loader_numel", tensor.numel())) * tensor.itemsize


def quantises(method: Any) -> bool:
    """Whether the method stores weights in another form than they are loaded in, and computes the one from the other after loading."""
    return (
        type(method).__module__.startswith(PROCESSING)
        and not isinstance(method, BaseKVCacheMethod)
        and not type(method).__name__.startswith("Unquantized")
        and not keeps_load_format(method)
    )


def keeps_load_format(method: Any) -> bool:
    """Whether the method's step after loading is the base class's, which does nothing."""
    return type(method).process_weights_after_loading is QuantizeMethodBase.process_weights_after_loading


def is_accelerator_unquantized(method: Any, device: torch.device) -> bool:
    """Whether the method is of a plain linear layer, embedding or experts layer on CUDA whose step after loading leaves the weights as
    they are.

    Experts differ by their kernels: Triton's kernels read what was loaded, FlashInfer's kernels want the weights rearranged.
    """
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    if device.type != "cuda":
        return False
    if type(method) in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod):
        return True
    kernels = getattr(method, "unquantized_backend", None)
    return type(method).__name__ == "UnquantizedFusedMoEMethod" and getattr(kernels, "name", "") in _PLAIN_EXPERTS


_PLAIN_EXPERTS = frozenset({"TRITON", "BATCHED_TRITON"})


def is_packed_for_cpu(method: Any, device: torch.device) -> bool:
    """Whether the method is of a plain linear layer or embedding on CPU. Its step after loading packs the weight, and can be repeated
    at will."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    return device.type == "cpu" and type(method) in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)


def is_embedding(method: Any) -> bool:
    """Whether the method is of a plain embedding, or of an embedding that serves as output head."""
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    return type(method) is UnquantizedEmbeddingMethod


@contextmanager
def layerwise_reload(model: nn.Module, vllm_config: Any) -> Iterator[None]:
    """While inside, layers take checkpoint tensors, and each layer goes live when all of its tensors are there.

    When the body raises, layers that are not complete keep their former values, and the reload is over.
    """
    with set_current_vllm_config(vllm_config), torch.device(vllm_config.device_config.device):
        try:
            _forget_expert_kernels(model, vllm_config)
            initialize_layerwise_reload(model)
            yield
            finalize_layerwise_reload(model, vllm_config.model_config)
        except BaseException:
            _abandon(model)
            raise


def _forget_expert_kernels(model: nn.Module, vllm_config: Any) -> None:
    """On CPU experts are packed only while their kernel is made, so a reload has to make it again."""
    if vllm_config.device_config.device.type != "cpu":
        return
    for layer in model.modules():
        method = quant_method(layer)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def _abandon(model: nn.Module) -> None:
    for layer in model.modules():
        info = get_layerwise_info(layer)
        if info.kernel_tensors is not None:
            _place_kernel_tensors(layer, info)
            for tensor in own_tensors(layer).values():
                _unwrap(tensor)
        info.reset()
    if hasattr(model, "_original_do_torchao_reload"):
        model._do_torchao_reload = model._original_do_torchao_reload


def current_config(vllm_config: Any) -> Any:
    """The context in which vLLM's loaders expect to run."""
    return set_current_vllm_config(vllm_config)


def checkpoint_tensors(
    vllm_config: Any, model: nn.Module, draft_config: Any = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of the checkpoint that the engine was started with, or that its draft was, of this model configuration.
    Unsupported when the engine's load format has no checkpoint."""
    load_config = vllm_config.load_config
    if draft_config is not None:
        load_config = getattr(vllm_config.speculative_config, "draft_load_config", None) or load_config
    loader = get_model_loader(load_config)
    if not hasattr(loader, "get_all_weights"):
        raise Unsupported(
            f"weights of load format {load_config.load_format!r} cannot be loaded again",
            hint="The next successful publish() makes the engine serve again",
        )
    weights: Iterator[tuple[str, torch.Tensor]] = loader.get_all_weights(
        draft_config or vllm_config.model_config, model
    )
    return weights


_OF_PARAMETERS = frozenset({"data", "weight_loader"})


def refuses(error: Exception, name: str) -> bool:
    """Whether an exception of a loader says that the model has no place for the tensor of this name, which is the tensor that the
    loader took last. Loaders look up parameters by names of their own. These names have the numbers and the last part of the
    checkpoint's name."""
    if isinstance(error, KeyError) and error.args:
        wanted = str(error.args[0])
        return re.findall(r"\d+", wanted) == re.findall(r"\d+", name) and wanted.split(".")[-1] == name.split(".")[-1]
    if isinstance(error, AttributeError) and error.name in _OF_PARAMETERS:
        return True  # a fused layer without a bias, say, takes something else for the parameter
    found = re.search(r"no module or parameter named '([^']+)'", str(error))
    return found is not None and found[1].split(".")[-1] in name.split(".")


def build_twin(
    vllm_config: Any, device: torch.device, *, tied: bool, num_layers: int | None = None
) -> tuple[nn.Module, Any]:
    """The same model built anew, without weights, and its configuration. The engine's own model is not touched.

    Args:
        tied: whether the engine's output head shares the weight of its embeddings, which vLLM decides when it loads.
        num_layers: so many of its layers only.
    """
    config = copy.copy(vllm_config)
    config.compilation_config = copy.copy(vllm_config.compilation_config)
    # Layers put themselves down here by name, and a name may come once.
    config.compilation_config.static_forward_context = {}
    config.compilation_config.static_all_moe_layers = []
    if config.compilation_config.mode is not None:
        config.compilation_config.mode = type(config.compilation_config.mode)(0)  # nothing is compiled for a twin
    if num_layers is not None:
        config.model_config = _with_layers(config.model_config, num_layers)
    with set_default_torch_dtype(config.model_config.dtype), device:
        model: nn.Module = initialize_model(vllm_config=config, model_config=config.model_config)
    if tied:
        _tie(model)
    return model, config


def build_draft_twin(vllm_config: Any, target_config: Any, device: torch.device, draft: Draft) -> nn.Module:
    """The draft built anew, without weights and with all of its layers, beside a twin of its target whose configuration is given.
    ``target_config`` is the model configuration of the engine's own target: an MTP block counts its layers from there."""
    config, prefix = copy.copy(vllm_config), ""
    config.model_config = target_config
    if draft.method == "draft_model":  # a model like any other, with a configuration of its own
        config.model_config, config.quant_config, prefix = draft.model_config, None, "draft_model"
    with set_default_torch_dtype(draft.model_config.dtype), device:
        model: nn.Module = initialize_model(vllm_config=config, prefix=prefix, model_config=draft.model_config)
    if shares_head(draft.model):
        _tie(model)
    return model


def _with_layers(model_config: Any, count: int) -> Any:
    shorter = copy.copy(model_config)
    shorter.hf_config = copy.deepcopy(model_config.hf_config)
    shorter.hf_text_config = shorter.hf_config.get_text_config()
    shorter.hf_text_config.num_hidden_layers = count
    return shorter


def _tie(model: nn.Module) -> None:
    """As vLLM ties a head that turned out to equal the embeddings; a head that is tied already stays."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, VocabParallelEmbedding)]
    heads = [(name, layer) for name, layer in layers if isinstance(layer, ParallelLMHead)]
    embeddings = [layer for _, layer in layers if not isinstance(layer, ParallelLMHead)]
    if len(heads) == len(embeddings) == 1 and heads[0][1].weight is not embeddings[0].weight:
        parent, _, own = heads[0][0].rpartition(".")
        setattr(model.get_submodule(parent), own, heads[0][1].tie_weights(embeddings[0]))


@contextmanager
def keeping_parameters(model: nn.Module) -> Iterator[None]:
    """While inside, a parameter that a loader registers anew is the same memory as the parameter before it, so that what is recorded
    there is a landing. Some loaders register an output head's bias anew. For recording only: processing may replace parameters as it
    likes."""
    modules = {id(layer) for layer in model.modules()}
    here = threading.get_ident()

    def keep(layer: nn.Module, name: str, new: nn.Parameter | None) -> nn.Parameter | None:
        former = layer._parameters.get(name) if id(layer) in modules and threading.get_ident() == here else None
        if new is None or former is None or former is new or former.is_meta:
            return None
        if (former.shape, former.dtype) != (new.shape, new.dtype):
            return None
        return nn.Parameter(former.data, requires_grad=False)

    hook = register_module_parameter_registration_hook(keep)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


def sleeping_tags() -> tuple[str, ...]:
    """Tags of the memory that vLLM's sleep has unmapped in this process."""
    return tuple(sorted({data.tag for data in _asleep()}))


def sleeping_nbytes() -> int:
    """Bytes that vLLM's sleep has unmapped in this process."""
    return sum(int(data.handle[1]) for data in _asleep())


def _asleep() -> list[Any]:
    """vLLM's records of the memory that its sleep has unmapped: 0.26 to 0.33 keep them alike, whatever their pools and tags."""
    module = sys.modules.get("vllm.device_allocator.cumem")
    allocator = None if module is None else module.CuMemAllocator.instance
    return [] if allocator is None else [data for data in tuple(allocator.pointer_to_data.values()) if data.is_asleep]


Look = Callable[[nn.Module], None]


@contextmanager
def before_processing(layer: nn.Module, look: Look) -> Iterator[None]:
    """Call a function with each layer whose weights are loaded and not yet processed. Layers without a method have no such moment,
    because they compute with what was loaded, where it was loaded."""
    method = quant_method(layer)
    if method is None:
        yield
        return
    process = method.process_weights_after_loading

    def looked(loaded: nn.Module) -> None:
        if loaded is layer:
            look(loaded)
        process(loaded)

    method.process_weights_after_loading = looked
    try:
        yield
    finally:
        del method.process_weights_after_loading


def load_anew(
    model: nn.Module, vllm_config: Any, device: torch.device, tensors: Iterator[tuple[str, torch.Tensor]]
) -> None:
    """Load a model that was just built, as vLLM's loader does when an engine starts."""
    with set_current_vllm_config(vllm_config), set_default_torch_dtype(vllm_config.model_config.dtype):
        model.load_weights(tensors)  # type: ignore[operator]
        if any(getattr(quant_method(layer), "uses_meta_device", False) for layer in model.modules()):
            finalize_layerwise_reload(model, vllm_config.model_config)
        process_weights_after_loading(model, vllm_config.model_config, device)
    model.eval()


def shares_head(model: nn.Module) -> bool:
    """Whether an output head and the embeddings are one parameter."""
    weights = [layer._parameters.get("weight") for layer in model.modules() if is_embedding(quant_method(layer))]
    return len({id(weight) for weight in weights}) < len(weights)
