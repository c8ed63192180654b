"""Adapters: layers of PEFT in a module, and what each of them computes with, merged into memory of our own by PEFT's own arithmetic.

Nothing of the user's is written: a layer's ``merge`` runs on a likeness of the layer, whose base weights lie in our memory. Nothing is
imported: classes of PEFT are looked up where the user's program has imported them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from weightcast.errors import StateError, Unsupported, WeightcastError
from weightcast.sources.quantised import is_quantised, refuse_unknown

MERGE_HINT = "Publish what merge_and_unload() returns, or the state dict of it, where PEFT can merge this kind"
_PLAIN_FORMS = ("peft.tuners.lora.bnb", "peft.tuners.lora.layer")
"""Where the layers are that merge into weights which are not quantised as their plain kind does."""
_CONTAINERS = (dict, list, set)
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)
"""Parameters, parts and hooks, which merging reads only. A likeness is made for each adapter in each round, so copies count."""
Seen = Callable[[nn.Module, str, nn.Parameter], nn.Parameter]
"""A parameter as merging is to see it, by the module that has it and its name there."""


def _kind(module: str, name: str) -> Any:
    """A class of PEFT, or None where the user's program has not imported it."""
    return getattr(sys.modules.get(module), name, None)


def is_model(module: nn.Module) -> bool:
    """Whether a module is what ``get_peft_model`` returns."""
    kinds = (_kind("peft.peft_model", "PeftModel"), _kind("peft.mixed_model", "PeftMixedModel"))
    return isinstance(module, tuple(kind for kind in kinds if kind is not None))


def is_adapter(module: nn.Module) -> bool:
    """Whether a module is a layer of PEFT around a layer of the base model."""
    kind = _kind("peft.tuners.tuners_utils", "BaseTunerLayer")
    return kind is not None and isinstance(module, kind)


def is_chooser(module: nn.Module) -> bool:
    """Whether a module stands for one of several modules, such as ``modules_to_save``, or for an embedding with trained tokens."""
    kind = _kind("peft.utils.other", "AuxiliaryTrainingWrapper")
    return kind is not None and isinstance(module, kind)


def has_adapters(module: nn.Module) -> bool:
    """Whether PEFT has changed anything of a module."""
    return any(is_model(part) or is_adapter(part) or is_chooser(part) for part in module.modules())


def refuse_unmerged(names: Iterable[str]) -> None:
    """Raise Unsupported for a mapping of an adapted module's own tensors, of which none is a merged one."""
    for name in names:
        if isinstance(name, str) and (".base_layer." in name or ".lora_A." in name):
            raise Unsupported(
                f"the mapping has weights of PEFT that are not merged, such as {name!r}",
                hint="Give the PEFT model itself, whose merged weights are published, or the state dict of what merge_and_unload() returns",
            )


def inside(module: nn.Module, name: str) -> nn.Module:
    """The module of the base model, or the adapter around it, that a module of PEFT stands for; other modules are themselves.

    Raises Unsupported for what has no merged weights, such as prompts.
    """
    while (found := _one_inside(module, name)) is not module:
        module = found
    return module


def _one_inside(module: Any, name: str) -> nn.Module:
    """What one wrapper stands for; a module that is none is itself."""
    tuner = _kind("peft.tuners.tuners_utils", "BaseTuner")
    found: Any = module
    if is_model(module):
        found = module.base_model
        if tuner is None or not isinstance(found, tuner):
            how = getattr(module.active_peft_config, "peft_type", type(found).__name__)
            raise Unsupported(
                f"{name or 'the module'} is a PEFT model of type {getattr(how, 'value', how)}, whose weights have no merged form",
                hint="Publish the base model, model.get_base_model(), and keep what PEFT adds to the prompt in the trainer",
            )
    elif tuner is not None and isinstance(module, tuner):
        found = module.model
    elif is_chooser(module):
        found = _chosen(module, name)
    return found  # type: ignore[no-any-return]


def _chosen(module: Any, name: str) -> nn.Module:
    """What a wrapper of a module that is trained as a whole, or of trained tokens, computes with now."""
    if hasattr(module, "token_adapter"):
        return module.token_adapter  # type: ignore[no-any-return]
    if not hasattr(module, "modules_to_save"):
        raise Unsupported(f"{name!r} is a {type(module).__name__} of PEFT, which is not known here", hint=MERGE_HINT)
    active = [each for each in module.active_adapters if each in module.modules_to_save]
    if module.disable_adapters or not active:
        return module.original_module  # type: ignore[no-any-return]
    if len(active) > 1:
        raise StateError(
            f"{name!r} has several active modules_to_save ({', '.join(active)}), of which a model uses one",
            hint="Activate one of them with set_adapter()",
        )
    return module.modules_to_save[active[0]]  # type: ignore[no-any-return]


def base_of(adapter: Any) -> nn.Module:
    """The base model's layer inside of an adapter."""
    return adapter.get_base_layer()  # type: ignore[no-any-return]


def targets_of(adapter: Any, name: str) -> dict[str, nn.Parameter]:
    """The parameters of the base layer that merging may change, by their names there.

    Raises Unsupported naming an adapter whose weights PEFT merges in a way that is not known here.
    """
    wrapper = _kind("peft.tuners.lora.layer", "ParamWrapper")
    is_wrapper = wrapper is not None and isinstance(adapter, wrapper)
    if not is_wrapper and hasattr(adapter, "unload_and_optionally_merge_module"):
        raise Unsupported(f"{name!r} is a PEFT layer around a {type(base_of(adapter)).__name__}", hint=MERGE_HINT)
    parameters: Mapping[str, Any] = base_of(adapter)._parameters
    if is_wrapper:
        wanted = {layer.parameter_name for layer in _layers(adapter)}
        parameters = {key: parameters[key] for key in parameters if key in wanted}
    targets = {key: value for key, value in parameters.items() if value is not None}
    is_packed = is_quantised(base_of(adapter))
    if is_packed and type(adapter).__module__ not in _PLAIN_FORMS:
        raise Unsupported(f"{name!r} is a {type(adapter).__name__} of PEFT around a quantised layer", hint=MERGE_HINT)
    for key, value in targets.items():
        if is_packed and key == "weight":
            refuse_unknown(base_of(adapter), name)
        elif not value.is_floating_point() or value.layout is not torch.strided or value.element_size() < 2:
            raise Unsupported(
                f"{name}.{key} is quantised ({type(value).__name__}, {value.dtype}), and is not dequantised here",
                hint=MERGE_HINT,
            )
    if not targets:
        raise Unsupported(f"{name!r} is a PEFT layer around a {type(base_of(adapter)).__name__}", hint=MERGE_HINT)
    return targets


def _layers(adapter: Any) -> list[Any]:
    """The adapter and those that it wraps, which PEFT nests where it adapts several parameters of one module."""
    layers = [adapter]
    while is_adapter(layers[-1].base_layer):
        layers.append(layers[-1].base_layer)
    return layers


def _in_order(layers: list[Any]) -> list[Any]:
    """Nested adapters in the order in which PEFT merges them: sums of floating-point numbers depend on it."""
    wrapper = _kind("peft.tuners.lora.layer", "ParamWrapper")
    is_wrapper = wrapper is not None and isinstance(layers[0], wrapper)
    return layers if is_wrapper else [*layers[1:], layers[0]]


def is_elementwise(adapter: nn.Module) -> bool:
    """Whether a merged weight is a sum of the base weight and what does not depend on base weights."""
    kinds = [_kind("peft.tuners.lora.layer", name) for name in ("Linear", "Embedding", "ParamWrapper")]
    known = tuple(kind for kind in kinds if kind is not None)
    return all(isinstance(layer, known) and not layer.lora_variant for layer in _layers(adapter))


def said_of(adapter: nn.Module) -> str:
    """What decides how an adapter is merged; ranks that merge together have to agree in it."""
    said: list[Any] = []
    for layer in _layers(adapter):
        scaling = getattr(layer, "scaling", None)
        said.append((type(layer), layer.disable_adapters, layer.merged_adapters, layer.active_adapters, scaling))
    return repr(said)


def merge(adapter: nn.Module, name: str, values: Mapping[str, torch.Tensor], seen: Seen) -> None:
    """Make of base weights, which lie in ``values`` by their names in the base layer, the weights that the adapter computes with now.

    Adapters that were merged are in the base weights; adapters that are disabled or not active are left out. ``seen`` gives the
    parameters of the adapter. To be called without gradients and autocast.
    """
    held = {key: nn.Parameter(value, requires_grad=False) for key, value in values.items()}
    alike = likeness(adapter, base_of(adapter), held, seen)
    try:
        for layer in _in_order(_layers(alike)):
            if layer.disable_adapters and layer.merged:
                layer.unmerge()
            elif not layer.disable_adapters and not layer.merged:
                layer.merge()
    except WeightcastError:
        raise
    except Exception as error:  # PEFT's own code, whose kinds of layers raise what they like
        raise Unsupported(
            f"PEFT cannot merge {name!r}, a {type(adapter).__name__}: {type(error).__name__}: {error}", hint=MERGE_HINT
        ) from error
    base = base_of(alike)
    for key, value in values.items():
        made = base._parameters[key]
        assert made is not None
        if made.data_ptr() != value.data_ptr() or made.dtype != value.dtype or made.stride() != value.stride():
            value.copy_(made)


def likeness(module: nn.Module, base: nn.Module, held: Mapping[str, nn.Parameter], seen: Seen) -> nn.Module:
    """A module with the same attributes, in which ``base`` has the parameters ``held``, and other parts those that ``seen`` gives.
    What is set in it, or put into a dict or list of it, is not seen by the module."""
    alike = bare(module, _plain_kind(module))
    if module is base:
        alike.__dict__["_parameters"] = {**module._parameters, **held}
        return alike
    values, parts = module._parameters.items(), module._modules.items()
    alike.__dict__["_parameters"] = {key: None if value is None else seen(module, key, value) for key, value in values}
    alike.__dict__["_modules"] = {
        key: None if part is None else likeness(part, base, held, seen) for key, part in parts
    }
    return alike


def _plain_kind(module: nn.Module) -> type[nn.Module]:
    """The class of a module, or of what it would be around weights that are not quantised."""
    if is_quantised(module):
        return nn.Linear
    if type(module).__module__ == "peft.tuners.lora.bnb":
        return _kind("peft.tuners.lora.layer", "Linear")  # type: ignore[no-any-return]
    return type(module)


def bare(module: nn.Module, kind: type[nn.Module] | None = None) -> nn.Module:
    """A module of the same class, or of another, with the same parts and attributes, and dicts and lists of its own."""
    alike: nn.Module = object.__new__(kind or type(module))
    for key, value in module.__dict__.items():
        is_own = type(value) in _CONTAINERS and key not in _OF_EVERY_MODULE
        alike.__dict__[key] = value.copy() if is_own else value
    return alike
