"""A twin of a worker's model shows what a round leaves behind: built anew, loaded, published to, and compared with a fresh load.

vLLM's reload renews parameters and buffers of the layers that it loads. What a layer derived from them when it was built or first
loaded is nobody's: models of state-space layers keep a view of a weight whose memory the kernels no longer read. So the round's own
calls are played on a twin, and everything that its forward pass can read has to be what a fresh load of the same values makes.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from weightcast.content.layout_digest import digest_tensor
from weightcast.engines.stock.reach import Alias, aliases, reachable, reachable_numbers
from weightcast.engines.vllm import api
from weightcast.engines.vllm.drafts import WithDraft, share_as
from weightcast.errors import ShadowError, Unsupported
from weightcast.layout import Layout
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest
from weightcast.manifest.dtypes import dtype_of
from weightcast.receiver.base import LiveModel
from weightcast.receiver.place import free_nbytes

logger = logging.getLogger(__name__)

WHOLE_NBYTES = 256 * 2**20
"""The twin of a model of up to so many bytes is whole."""
_PERIOD = 1_048_583
"""Prime, so that no two rows, slices or tensors begin alike."""


class Values:
    """Values for every tensor of a manifest, made when they are asked for. The same name always has the same values, and no value is
    extreme.

    ``alike`` maps names to other names whose values they share.
    """

    def __init__(self, manifest: Manifest, alike: Mapping[str, str]) -> None:
        self._specs = {spec.name: spec for spec in manifest.tensors}
        self._alike = alike
        generator = torch.Generator("cpu").manual_seed(0x5EED)
        self._cells = torch.rand(_PERIOD, generator=generator, dtype=torch.float32, device="cpu") * 0.99 + 0.01

    def __call__(self, name: str) -> torch.Tensor:
        spec = self._specs[name]
        start = int.from_bytes(self._alike.get(name, name).encode(), "big") % _PERIOD
        dtype = dtype_of(spec.dtype)
        cells = self._cells.roll(start) if dtype.is_floating_point else self._cells.roll(start) * 100
        numel = max(1, torch.Size(spec.shape).numel())
        row = cells.to(dtype)[: min(numel, _PERIOD)]
        return row.repeat(-(-numel // _PERIOD))[:numel].reshape(spec.shape)

    def uniform(self, name: str) -> torch.Tensor:
        """A tensor of one value, in the memory of one element."""
        spec = self._specs[name]
        return torch.full((1,), 0.5, dtype=torch.float32, device="cpu").to(dtype_of(spec.dtype)).expand(spec.shape)

    def items(self, make: Callable[[str], torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield all names with what ``make`` makes for them, one at a time."""
        return ((name, make(name)) for name in self._specs)


@dataclass(frozen=True, kw_only=True)
class Original:
    """The model that twins are made of, as the engine serves it, with its vLLM configuration."""

    model: nn.Module
    vllm_config: Any
    device: torch.device
    num_layers: int | None = None
    """So many layers show what all of them are like; None: a twin has as many as the model."""

    @property
    def target(self) -> nn.Module:
        """The model without its draft."""
        return self.model.target if isinstance(self.model, WithDraft) else self.model

    def is_kept(self, name: str, count: int | None) -> bool:
        """Whether a twin of so many layers has the tensor or the layer of this name. A draft has all of its layers."""
        is_of_draft = isinstance(self.model, WithDraft) and self.model.is_of_draft(name)
        return count is None or is_of_draft or _number_in(name) < count

    def twin(self) -> tuple[nn.Module, Any]:
        """The model built anew, without weights, and its configuration."""
        tied = api.shares_head(self.target)
        twin, config = api.build_twin(self.vllm_config, self.device, tied=tied, num_layers=self.num_layers)
        if isinstance(self.model, WithDraft):
            draft = api.build_draft_twin(config, self.vllm_config.model_config, self.device, self.model.draft)
            share_as(self.model, twin, draft)
            twin = WithDraft(twin, self.model.draft._replace(model=draft), self.model.unclaimed)
        return twin, config


@dataclass(frozen=True)
class Findings:
    """What twins showed of a model's form."""

    aliases: list[Alias] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    """Places that a round leaves at other values than a fresh load."""


def findings_of(
    original: Original,
    manifest: Manifest,
    alike: Mapping[str, str],
    adopt: Callable[[nn.Module, Any, list[Alias]], LiveModel],
) -> Findings:
    """Publish to one twin, load another twin anew, and compare the two. ``adopt`` makes a twin a live model.

    Raises Unsupported when a twin cannot be built, because nobody can tell then what a round leaves behind.
    """
    original, manifest = _small(original, manifest)
    values = Values(manifest, alike)
    try:
        with _aside(original):
            found, published = _published(original, manifest, values, adopt)
            fresh = _fresh(original, values)
            differ = sorted(place for place in {*published, *fresh} if published.get(place) != fresh.get(place))
            if differ:
                again = _fresh(original, values)  # memory that nobody fills differs from load to load
                differ = [place for place in differ if fresh.get(place) == again.get(place)]
    except Exception as error:
        logger.exception("a twin of the model")
        raise Unsupported(
            f"cannot tell what a round would leave behind in this model: {type(error).__name__}: {error}",
            hint="The engine's log has the traceback; other models of this vLLM are not concerned",
        ) from error
    return Findings(found, differ)


def _small(original: Original, manifest: Manifest) -> tuple[Original, Manifest]:
    """A large model's twin has only the first layers, as many as it takes to have one of each kind. Raises ShadowError where there
    is no room for it."""
    if sum(_sizes(original)) > WHOLE_NBYTES:
        layers, count = _layers_of_each_kind(original.target)
        if 0 < count < layers:
            original = replace(original, num_layers=count)
            manifest = Manifest.of([spec for spec in manifest.tensors if original.is_kept(spec.name, count)])
    sizes = _sizes(original)
    # On CPU layers are packed beside what was published; elsewhere one tensor after the other is.
    needed = 3 * sum(sizes) if original.device.type == "cpu" else sum(sizes) + 2 * max(sizes, default=0)
    free = free_nbytes(original.device)
    if needed > free:
        raise ShadowError(
            f"what a round leaves behind in this model is tried on a twin of it, which takes {needed} bytes; "
            f"{free} are free on {original.device}",
            hint="Leave the engine more memory (vLLM: --gpu-memory-utilization)",
        )
    return original, manifest


def _sizes(original: Original) -> list[int]:
    """Bytes of a twin's tensors as they are loaded."""
    return [
        meta.nbytes
        for name, layer in original.model.named_modules()
        if original.is_kept(name, original.num_layers)
        for meta in api.load_format(layer).values()
    ]


def _layers_of_each_kind(model: nn.Module) -> tuple[int, int]:
    """How many layers the model's longest list has, and how many of the first have one of each kind among them."""
    lists = [p for name, p in model.named_modules() if isinstance(p, nn.ModuleList) and _number_in(name) < 0]
    layers = max(lists, key=len, default=nn.ModuleList())
    firsts: dict[object, int] = {}
    for number, layer in enumerate(layers):
        kind = tuple((inner, type(part)) for inner, part in layer.named_modules())
        firsts.setdefault(kind, number)
    return len(layers), 1 + max(firsts.values(), default=-1)


def _number_in(name: str) -> int:
    """The first number in a tensor's name, which counts layers; -1 for tensors outside of them."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def _published(
    original: Original,
    manifest: Manifest,
    values: Values,
    adopt: Callable[[nn.Module, Any, list[Alias]], LiveModel],
) -> tuple[list[Alias], dict[str, object]]:
    twin, config = original.twin()
    found = aliases(twin, api.HELPERS)
    api.load_anew(twin, config, original.device, values.items(values.uniform))
    live = adopt(twin, config, found)
    publish(live, live.layout(manifest), values)
    return found, _contents(twin, config, original.device)


def _fresh(original: Original, values: Values) -> dict[str, object]:
    twin, config = original.twin()
    api.load_anew(twin, config, original.device, values.items(values))
    return _contents(twin, config, original.device)


def publish(live: LiveModel, layout: Layout, make: Callable[[str], torch.Tensor]) -> None:
    """Bring values into a model by the calls that a round makes."""
    memory, processing = live.memory(), live.processing
    if live.relocatable:
        memory = Memory([storage.clone() for storage in memory.storages], is_arena=memory.is_arena)
    direct = memory
    if processing is not None:
        unprocessed = torch.zeros(processing.nbytes, dtype=torch.uint8, device=live.device)
        processing.reserve(unprocessed, lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, device=live.device))
        memory = Memory([*memory.storages, unprocessed])
    name, whole = "", None
    for placement in layout.placements:
        if whole is None or placement.region.name != name:
            name = placement.region.name
            whole = make(name)
        part = whole
        for axis, (offset, size) in enumerate(zip(placement.region.offsets, placement.region.sizes, strict=True)):
            part = part.narrow(axis, offset, size)
        memory.view(
            placement.storage, placement.dtype, placement.offset, placement.region.sizes, placement.strides
        ).copy_(part)
    if live.relocatable:
        live.derive(direct)
        live.rebind(direct)
    else:
        live.refresh()
    if processing is not None:
        processing.process()
        processing.exchange()
        processing.forget()
    if layout.through_loader:
        live.load_weights((name, make(name).to(live.device)) for name in layout.through_loader)


def _contents(model: nn.Module, config: Any, device: torch.device) -> dict[str, object]:
    """What the model computes with, by place: digests of tensors, numbers, and what packed layers answer."""
    found: dict[str, object] = dict(reachable_numbers(model, api.HELPERS))
    for place, tensor in reachable(model, api.HELPERS).items():
        form = (tuple(tensor.shape), tensor.dtype)
        readable = not tensor.is_meta and tensor.layout is torch.strided
        found[place] = (form, digest_tensor(tensor) if readable and tensor.numel() else 0)
    if device.type == "cpu":
        found |= {place: digest_tensor(answer) for place, answer in _answers(model, config)}
    return found


def _answers(model: nn.Module, config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """What layers whose weights may lie in a kernel's own memory make of one input."""
    for name, layer in model.named_modules():
        size = getattr(layer, "input_size_per_partition", None) or getattr(layer, "embedding_dim", None)
        if size and (hasattr(layer, "cpu_linear") or api.quantises(api.quant_method(layer))):
            given = (
                torch.linspace(-1, 1, 3 * size, dtype=torch.float32, device="cpu")
                .view(3, size)
                .to(config.model_config.dtype)
            )
            yield f"{name}()", api.quant_method(layer).apply(layer, given, None)


@contextmanager
def _aside(original: Original) -> Iterator[None]:
    """Beside the engine: its random numbers stay where they are, and the twins' memory is given back."""
    devices = [original.device] if original.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        gc.collect()
        if devices:
            torch.cuda.empty_cache()
