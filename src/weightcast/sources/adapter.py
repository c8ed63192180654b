"""AdapterSource: publish one LoRA adapter of a PEFT model by itself, from where its matrices lie.

Nothing of the base model is read. PEFT is not imported: its classes are known where the user's program has imported them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from weightcast.deadline import Deadline
from weightcast.errors import MERGED_HINT, InvalidInput, StateError, Unsupported
from weightcast.manifest.adapters import (
    CONFIG_NAME,
    AdapterConfig,
    config_bytes,
    factor_names,
    merge_scalings,
)
from weightcast.sources.absent import refuse_absent
from weightcast.sources.adapters import is_adapter, is_chooser, is_model
from weightcast.sources.base import Source
from weightcast.sources.conversions import Content
from weightcast.sources.gathered import check_together
from weightcast.sources.module import ModuleSource
from weightcast.sources.outer import OuterSource
from weightcast.sources.sharded import ShardedSource
from weightcast.sources.shards import is_distributed, local_of
from weightcast.sources.tree import AGAIN_HINT, Entries
from weightcast.sources.wrappers import plain_names, unwrapped

_REWRITE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""How the names begin of initialisations that take the first factors out of the base weights."""
_OF_BASE = ("base_layer", "original_module", "token_adapter")
"""Parts of PEFT's layers and wrappers in which modules of the base model lie."""
GATHER_S = 60.0
"""How long ranks wait for each other where no call's deadline is known."""


class _Published(nn.Module):
    """The user's module, and the bytes of the adapter's config beside it."""

    config: torch.Tensor

    def __init__(self, module: nn.Module, config: torch.Tensor) -> None:
        super().__init__()
        self.model = module
        self.register_buffer("config", config)


class Adapter:
    """One LoRA adapter of a PEFT model: its matrices under the names of PEFT's checkpoints, and its config at this moment."""

    def __init__(self, module: object, name: str) -> None:
        """``name``: that of the adapter in the model. Unsupported names what cannot be served as an adapter."""
        self.model = model = _peft_model(module)
        self.name = name
        if name not in model.peft_config:
            raise InvalidInput(
                f"the model has no adapter {name!r}",
                field="adapter",
                hint="Add or load it under this name; for another adapter make a new Publisher",
            )
        self._base: nn.Module = model.base_model.model
        _refuse_kind(model.peft_config[self.name], self.name)
        self.layers = self._current_layers()
        """PEFT's layers that this adapter has a part in, by the base model's name."""
        if not self.layers:
            raise InvalidInput(f"the adapter {self.name!r} has no LoRA layers", field="adapter", hint=MERGED_HINT)
        self._refuse_trained_base(self._base)
        self._entries = Entries(self._base)

    def _current_layers(self) -> dict[str, Any]:
        layers: dict[str, Any] = {}
        for path, part in self._base.named_modules():
            if is_chooser(part) and self.name in _choices_of(part):
                raise _unsupported(self.name, f"trains {path!r} as a whole (modules_to_save, trainable_token_indices)")
            if is_adapter(part) and self._has(part, path):
                layers[path] = part
        plain = plain_names(self._base, [f"{path}.weight" for path in layers])
        return {plain[f"{path}.weight"].removesuffix(".weight"): part for path, part in layers.items()}

    def check(self) -> None:
        """Raise StateError where other layers have the adapter than at connect()."""
        if self._entries.are_as_remembered() and self.name in self.model.peft_config:
            return
        layers = {} if self.name not in self.model.peft_config else self._current_layers()
        for path in sorted(layers.keys() | self.layers.keys()):
            if layers.get(path) is not self.layers.get(path):
                what = (
                    "came to" if path not in self.layers else "is gone from" if path not in layers else "is another in"
                )
                raise StateError(f"the adapter {self.name!r} {what} {path!r} since connect()", hint=AGAIN_HINT)
        self._entries = Entries(self._base)

    def _refuse_trained_base(self, base: nn.Module) -> None:
        """Raise Unsupported for parameters of the base model that are trained: an engine has other values of these."""
        of_peft = {
            id(value)
            for part in base.modules()
            if is_adapter(part) or is_chooser(part)
            for key, own in part.named_children()
            if key not in _OF_BASE
            for value in own.parameters()
        }
        for path, value in base.named_parameters():
            if value.requires_grad and id(value) not in of_peft:
                raise _unsupported(
                    self.name,
                    f"is trained beside {path!r} of the base model",
                    f"Freeze what is not trained (requires_grad_(False)) before the Publisher is made. {MERGED_HINT}",
                )

    def _has(self, layer: Any, path: str) -> bool:
        """Whether a layer of PEFT computes with this adapter; Unsupported for one that an engine could not compute."""
        name = self.name
        if name in getattr(layer, "lora_embedding_A", ()):
            raise _unsupported(name, f"is for the embedding {path!r}")
        if name not in getattr(layer, "lora_A", ()):
            return False
        if hasattr(layer, "parameter_name"):
            raise _unsupported(name, f"is for the parameter {layer.parameter_name!r} of {path!r} (target_parameters)")
        if layer.use_dora.get(name) or name in layer.lora_variant:
            raise _unsupported(name, f"is a variant of LoRA in {path!r}, such as DoRA")
        factors = (layer.lora_A[name], layer.lora_B[name])
        if not all(isinstance(each, nn.Linear) for each in factors):
            raise _unsupported(name, f"is for a {type(layer.get_base_layer()).__name__}, {path!r}")
        if any(each.bias is not None for each in factors):
            raise _unsupported(name, f"has a bias in {path!r} (lora_bias)", "Make the adapter with lora_bias=False")
        return True

    def tensors(self) -> dict[str, torch.Tensor]:
        """The matrices by their names in a checkpoint."""
        found: dict[str, torch.Tensor] = {}
        for path, layer in self.layers.items():
            a, b = factor_names(path)
            found[a], found[b] = layer.lora_A[self.name].weight, layer.lora_B[self.name].weight
        return found

    def config(self) -> AdapterConfig:
        """What the matrices mean now; ``scaling`` is what PEFT's layers compute with."""
        said = self.model.peft_config[self.name]
        scaling, scalings = merge_scalings(
            {path: float(layer.scaling[self.name]) for path, layer in self.layers.items()}
        )
        return AdapterConfig(
            r=int(said.r),
            lora_alpha=float(said.lora_alpha),
            use_rslora=bool(said.use_rslora),
            target_modules=tuple(sorted({path.rpartition(".")[2] for path in self.layers})),
            scaling=scaling,
            scalings=scalings,
        )


class AdapterSource(OuterSource):
    """Publishes one adapter of a PEFT model, its config included, which is looked at in every round.

    Everything else is what a module's source does with the tensors of the adapter.
    """

    def __init__(self, module: object, name: str, *, dtype: torch.dtype | None = None) -> None:
        self._adapter = adapter = Adapter(module, name)
        tensors = adapter.tensors()
        refuse_absent(tensors)
        device = local_of(next(iter(tensors.values()))).device
        self._said = config_bytes(adapter.config())
        self._published = _Published(adapter.model, _as_tensor(self._said, device))
        named: Mapping[str, torch.Tensor] = {**tensors, CONFIG_NAME: self._published.config}
        inner: Source
        self._shard = next(filter(is_distributed, tensors.values()), None)
        if self._shard is not None:
            inner = ShardedSource(Content.plain(named), dtype=dtype, module=self._published)
        else:
            inner = ModuleSource(self._published, dtype=dtype, names=named)
        super().__init__(inner)
        self.is_copied, self.is_private = inner.is_copied, inner.is_private

    def _take_config(self) -> None:
        """Publish the config of this moment, in which ranks that hold shards have to agree."""
        check_together(self._shard, self._said_now, self.deadline or Deadline(GATHER_S))
        self._look_at_config()

    def _said_now(self) -> bytes:
        self._adapter.check()
        return config_bytes(self._adapter.config())

    def _look_at_config(self, *, writes: bool = True) -> None:
        """Publish the config of this moment; StateError where its form is another one. Without ``writes`` only that is looked at."""
        said = config_bytes(self._adapter.config())
        if said == self._said:
            return
        if len(said) != len(self._said):
            raise StateError("the config of the adapter is longer than at connect()", hint=AGAIN_HINT)
        if not writes:
            return
        self._published.config.copy_(_as_tensor(said, self._published.config.device))
        self._said = said

    @property
    def own_nbytes(self) -> int:
        return len(self._said) + self._inner.own_nbytes

    def refresh(self) -> None:
        self._take_config()
        self._inner.refresh()

    def fill(self) -> None:
        self._take_config()
        self._inner.fill()

    def gather(self) -> None:
        self._take_config()
        self._inner.gather()

    def check_form(self) -> None:
        self._adapter.check()
        self._look_at_config(writes=False)
        self._inner.check_form()

    def follow(self) -> bool:
        self._adapter.check()
        return super().follow()

    def let_go(self) -> bool:
        if not self._inner.let_go():
            return False
        self._take_over()
        return True


def adapter_named(source: object, wanted: str) -> str:
    """The name that an adapter has in a PEFT model: the wanted one, or any where the model has one adapter only."""
    names = list(_peft_model(source).peft_config)
    if wanted in names:
        return wanted
    if len(names) == 1:
        return str(names[0])
    if not names:
        raise InvalidInput(
            "the model has no adapter",
            field="adapter",
            hint="Add one with add_adapter(), or load one with load_adapter()",
        )
    raise InvalidInput(
        f"the model has several adapters, and none of them is named {wanted!r}",
        field="adapter",
        hint=f"Give the name of one of them: {', '.join(names)}",
    )


def _peft_model(source: object) -> Any:
    if not isinstance(source, nn.Module) or not is_model(unwrapped(source)):
        raise InvalidInput(
            f"adapter= is for what get_peft_model() returns, not for a {type(source).__name__}",
            field="source",
            hint="Give the PEFT model, or publish whole weights without adapter=",
        )
    return unwrapped(source)


def _refuse_kind(config: Any, name: str) -> None:
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise _unsupported(name, f"is of type {kind}, and engines serve LORA only")
    if getattr(config, "bias", "none") != "none":
        raise _unsupported(name, f"trains biases of the base model (bias={config.bias!r})")
    start = getattr(config, "init_lora_weights", True)
    if str(start).lower().startswith(_REWRITE):
        raise _unsupported(name, f"is for base weights that its initialisation changed (init_lora_weights={start!r})")


def _choices_of(chooser: Any) -> tuple[str, ...]:
    """The adapters that a wrapper of a whole module, or of trained tokens, has a part for."""
    own = getattr(chooser, "token_adapter", None)
    parts = chooser.modules_to_save if own is None else own.trainable_tokens_delta
    return tuple(parts)


def _unsupported(name: str, what: str, hint: str = MERGED_HINT) -> Unsupported:
    return Unsupported(f"the adapter {name!r} {what}, which cannot be served as an adapter", hint=hint)


def _as_tensor(data: bytes, device: torch.device) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
