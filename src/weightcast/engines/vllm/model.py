"""VllmModel: the live model of one vLLM worker.

Two properties are load-bearing. Tensors land only in layers that read what was loaded, or are merely packed from it (on CPU); what
vLLM quantises or derives goes through its own layerwise reload, whole layers at a time. And a manifest that would leave a
layer half filled is refused while nothing is written yet.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any, NamedTuple

import msgspec
import torch
from torch import nn

from weightcast.commit.worker_outcome import WEIGHTS
from weightcast.content.live_tensors import LiveTensor, live_tensors
from weightcast.engines.stock.layers import (
    LayerTensors,
    check_complete,
    checksums_of,
    kept_once,
    live_memory,
    names_through_loader,
    shown,
    storages_of,
)
from weightcast.engines.stock.reach import Alias, reachable
from weightcast.engines.stock.record_check import names_that_differ
from weightcast.engines.stock.worker import StockModel
from weightcast.engines.vllm import api
from weightcast.engines.vllm.derived import Kept, kept_by_layer, renewed_by_reload
from weightcast.engines.vllm.drafts import NOT_IN_CHECKPOINT, PART, PREFIX, Draft, WithDraft, check_published
from weightcast.engines.vllm.formats import classify, in_load_format, quantised, tied_embeddings
from weightcast.engines.vllm.mirror import Mirror, Slots, landings_in, plan_mirror
from weightcast.engines.vllm.processing import Processable, ProcessedLayers, plan_unprocessed
from weightcast.engines.vllm.twin import Findings, Original, findings_of
from weightcast.errors import LoadError, ShadowError, Unsupported, WeightcastError
from weightcast.layout import Layout, Placement
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest
from weightcast.manifest.names import number_of
from weightcast.receiver.base import LiveModel
from weightcast.record import Recording, record_layout

logger = logging.getLogger(__name__)


class Known(NamedTuple):
    """What is known of an engine's own model before a twin of the model is made."""

    distrusted: set[str]
    aliases: list[Alias]
    unfit: dict[str, str]


class _Extent(NamedTuple):
    """As much of a worker's models as a round changes."""

    model: nn.Module
    landable: dict[str, bool]
    processable: Processable
    weights: Memory
    """The weights' memory, where tensors land in live weights."""

    @classmethod
    def of(cls, model: nn.Module, device: torch.device, unfit: Mapping[str, str]) -> _Extent:
        landable = classify(model, device)
        processable = Processable(model, quantised(model, landable), device, unfit)
        return cls(model, landable, processable, Memory([]) if device.type == "cpu" else live_memory(model, landable))


class VllmModel(StockModel):
    """A worker's model as vLLM built and loaded it. Call a VllmModel on the worker's thread, between two steps; ``derive`` may be
    called from any thread.

    On CPU ``memory`` is the mirror that layers take their weights from. On other devices ``memory`` is the weights themselves.
    """

    def __init__(
        self,
        model: nn.Module,
        vllm_config: Any,
        device: torch.device,
        twin_of: Known | None = None,
        draft: Draft | None = None,
    ) -> None:
        """``twin_of`` is given for a twin: what is known already of the engine's own model. ``draft`` is what the engine speculates
        with."""
        self.device = device
        self.relocatable = device.type == "cpu"
        self._vllm_config = vllm_config
        unfit = {} if twin_of is None else twin_of.unfit
        self._alone = _Extent.of(model, device, unfit)
        self._whole = self._alone if draft is None else _Extent.of(WithDraft(model, draft), device, unfit)
        self._extent = self._whole
        """What the last layout was for."""
        self._kept_parts: tuple[str, ...] = ()
        self._processing: ProcessedLayers | None = None
        self._form: Slots | None = None
        self._kept: dict[str, list[Kept]] = {}
        self._mirror = Mirror({}, {}, Memory([]))
        self._checked: dict[str, set[str]] = {}
        self._twin_of = twin_of
        self._findings: dict[str, Findings] = {}
        self._layouts: dict[tuple[str, bool], tuple[Layout, ProcessedLayers | None]] = {}

    @property
    def model(self) -> nn.Module:
        """The model that rounds change: with its draft, unless the draft keeps its weights."""
        return self._extent.model

    def keep(self, parts: Sequence[str]) -> None:
        self._kept_parts = tuple(parts)

    def why_asleep(self) -> str:
        return "vLLM has unmapped its weights" if WEIGHTS in api.sleeping_tags() else ""

    @property
    def asleep_nbytes(self) -> int:
        return api.sleeping_nbytes()

    def memory(self) -> Memory:
        return self._mirror.live if self.relocatable else self._extent.weights

    @property
    def derived_nbytes(self) -> int:
        """The bytes of the packed form, and the bytes that the live mirror has reserved and not touched before its first use."""
        return 2 * self._mirror.live.nbytes

    def rebind(self, memory: Memory) -> None:
        """Make the mirror that was prepared last live."""
        self._mirror.go_live(memory)

    def derive(self, memory: Memory) -> None:
        """Pack what lies in another mirror; the model may compute meanwhile."""
        self._mirror.derive(memory)

    def refresh(self) -> None:
        """Pack the live mirror again."""
        self._mirror.refresh()

    def forget(self) -> None:
        """Free what was kept for the way back."""
        self._mirror.forget()
        if self._processing is not None:
            self._processing.forget()

    @property
    def processing(self) -> ProcessedLayers | None:
        return self._processing

    def layout(self, manifest: Manifest) -> Layout:
        """Return the landings in the landable layers. Every tensor that touches another layer goes through the loader.

        Ask for ``memory()`` afterwards. Raises PlanMismatch when a layer would be filled in part, LoadError when vLLM's loader refuses
        a tensor, and Unsupported when a round would leave something that the model computes with at old values.
        """
        extent = self._alone if PART in self._kept_parts else self._whole
        known = self._layouts.get((manifest.digest, extent is self._whole))
        if known is not None:
            self._extent = extent
            layout, self._processing = known
            return layout
        self._divide(manifest)
        if isinstance(extent.model, WithDraft):
            check_published(extent.model, manifest)
        found: Layout | None = None
        while found is None:
            with self._looking_at(extent), suppress(_RuledOut):
                found = self._recorded_layout(manifest)
        self._extent = extent
        if not self.relocatable:
            # Sleep leaves parameters where they are: who joins again after it need not record again.
            self._layouts = {(manifest.digest, extent is self._whole): (found, self._processing)}
        return found

    def _recorded_layout(self, manifest: Manifest) -> Layout:
        """Raises _RuledOut when some layers turned out to be unfit for being processed beside the engine: ask again."""
        places = reachable(self.model, api.HELPERS)
        with self._landed(manifest) as (layers, numbers, recording, through, landings):
            self._kept = kept_by_layer(self._aliases(manifest, recording, through), places)
            through -= kept_once(recording, through)
            fit = self._extent.processable.layers
            within = [layer for layer in layers if layer.name in fit]
            slots, unprocessed, landings = plan_unprocessed(within, numbers, landings, manifest)
            if self.relocatable:
                landings = self._mirror_of(layers, numbers, landings, manifest)
        self._processing = ProcessedLayers(fit, slots, self.device) if slots.nbytes else None
        sizes = [storage.numel() for storage in self.memory().storages]
        unprocessed = [msgspec.structs.replace(each, storage=len(sizes)) for each in unprocessed]
        return Layout(
            placements=(*landings, *unprocessed),
            storage_nbytes=(*sizes, *(() if self._processing is None else (self._processing.nbytes,))),
            through_loader=tuple(spec.name for spec in manifest.tensors if spec.name in through),
        )

    def _divide(self, manifest: Manifest) -> None:
        """Find out which tensors without a prefix are the draft's, where it has no checkpoint of its own."""
        whole = self._whole.model
        if self._twin_of is None and isinstance(whole, WithDraft) and whole.draft.is_of_same_checkpoint:
            live = not self.relocatable
            with self._looking_at(self._alone), self._recorded(manifest, live=live) as (_, _, _, recording):
                whole.unclaimed = frozenset(recording.unused)

    @contextmanager
    def _looking_at(self, extent: _Extent) -> Iterator[None]:
        """While inside, everything is about this extent of the model."""
        before, self._extent = self._extent, extent
        try:
            yield
        finally:
            self._extent = before

    def live_tensors(self, manifest: Manifest) -> dict[str, LiveTensor]:
        """Return what lies here of each tensor of a checkpoint. Where the checkpoint has none of the draft's, an entry under the draft's
        prefix says so. Changes nothing. Raises what ``layout`` raises."""
        whole = self._whole.model
        if not isinstance(whole, WithDraft):
            return self._live_tensors(manifest)
        unclaimed = whole.unclaimed
        try:
            self._divide(manifest)
            is_with_draft = any(whole.is_of_draft(spec.name) for spec in manifest.tensors)
            with self._looking_at(self._whole if is_with_draft else self._alone):
                found = self._live_tensors(manifest)
            return found if is_with_draft else {**found, PREFIX: LiveTensor(reason=NOT_IN_CHECKPOINT)}
        finally:
            whole.unclaimed = unclaimed

    def _live_tensors(self, manifest: Manifest) -> dict[str, LiveTensor]:
        with self._landed(manifest) as (layers, numbers, recording, through, landings):
            fit = [layer for layer in layers if layer.name in self._extent.processable.layers]
            _, unprocessed, landings = plan_unprocessed(fit, numbers, landings, manifest)
            if self.relocatable:
                landings = (
                    landings_in(self._form, layers, numbers, landings) if self._form and self._mirror.is_filled else []
                )
        reasons = dict.fromkeys(through, "its layer goes through vLLM's loader")
        reasons |= dict.fromkeys((p.region.name for p in unprocessed), "vLLM quantised it")
        reasons |= {name: f"goes through the loader: {reason}" for name, reason in recording.reasons.items()}
        lying, used = {p.region.name for p in landings}, {p.region.name for p in recording.layout.placements}
        reasons |= dict.fromkeys(used - lying - through - {*reasons}, "vLLM packed it for its kernels; publish once")
        return live_tensors(manifest, landings, reasons, self.memory())

    @contextmanager
    def _landed(
        self, manifest: Manifest
    ) -> Iterator[tuple[list[LayerTensors], dict[int, int], Recording, set[str], list[Placement]]]:
        """Layers in load format, numbers of their storages by address, what was recorded, the names of tensors that go through
        the loader, and the landings of all others; on CPU in stand-ins for the layers' tensors."""
        distrusted = self._distrusted(manifest)
        with self._recorded(manifest, live=not self.relocatable) as (layers, numbers, _, recording):
            check_complete(layers, numbers, recording, api.padding_nbytes)
            through = names_through_loader(layers, numbers, recording, distrusted)
            landings = [p for p in recording.layout.placements if p.region.name not in through]
            yield layers, numbers, recording, through, landings

    @contextmanager
    def _recorded(
        self, manifest: Manifest, *, live: bool
    ) -> Iterator[tuple[list[LayerTensors], dict[int, int], Memory, Recording]]:
        """The model's layers in load format, numbers of their storages by address, those storages, and what was recorded."""
        with (
            api.current_config(self._vllm_config),
            in_load_format(self.model, self._extent.landable, self._extent.processable.layers, live=live) as layers,
            api.keeping_parameters(self.model),
        ):
            stand_ins = [
                t for layer in layers if not (live and self._extent.landable[layer.name]) for t in layer.tensors
            ]
            memory = Memory([*(self._extent.weights.storages if live else ()), *storages_of(stand_ins)])
            recording = record_layout(self._load, manifest, memory, self.device, api.refuses)
            numbers = {storage.data_ptr(): number for number, storage in enumerate(memory.storages)}
            yield layers, numbers, memory, recording

    def _distrusted(self, manifest: Manifest) -> set[str]:
        """Names that land elsewhere than vLLM's own loader writes them; asked once for each form of a model."""
        if self._twin_of is not None:
            return self._twin_of.distrusted
        form = manifest.digest
        if form not in self._checked:
            with self._recorded(manifest, live=False) as (_, _, memory, recording):
                self._checked[form] = names_that_differ(self._load, manifest, memory, recording)
        if found := self._checked[form]:
            logger.warning("%d tensors go through vLLM's loader: it writes them in a way of its own: %s",
                           len(found), shown(sorted(found)))  # fmt: skip
        return self._checked[form]

    def _aliases(self, manifest: Manifest, recording: Recording, through: set[str]) -> list[Alias]:
        """Views of weights that the model keeps beside them; asked once for each form of a model.

        Raises Unsupported, with their places, when a round would leave tensors at old values, and ShadowError where that cannot be
        tried for want of room and vLLM's loader takes part. Where it does not, the weights are written where they are read.
        """
        if self._twin_of is not None:
            return self._twin_of.aliases
        form = manifest.digest
        if form not in self._findings:
            original = Original(model=self.model, vllm_config=self._vllm_config, device=self.device)
            alike = {later: earlier for earlier, later in reversed(recording.overlaps)}
            used = Manifest.of([spec for spec in manifest.tensors if spec.name not in set(recording.unused)])
            try:
                self._findings[form] = findings_of(original, used, alike, self._adopted_by(manifest))
            except ShadowError as error:
                if through or self._extent.processable.layers:
                    raise
                logger.warning("copies of weights that the model may keep were not looked for: %s", error)
                return []
            except Unsupported as error:
                if self._extent.processable.rule_out([*self._extent.processable.layers], str(error)):
                    raise _RuledOut from error
                raise
        found = self._findings[form]
        stale = [
            place
            for place in found.stale
            if self._extent.processable.rule_out([place], "a fresh load makes it otherwise")
        ]
        kept = [
            alias
            for alias in found.aliases
            if self._extent.processable.rule_out([alias.layer], f"{alias.place} is a view of it")
        ]
        if stale or kept:
            del self._findings[form]
            raise _RuledOut
        if found.stale:
            raise Unsupported(
                f"after an update {number_of(len(found.stale), 'tensor')} of this model would differ from those of a fresh load: "
                f"{shown(found.stale)}",
                hint="Restart the engine with each checkpoint, or serve the model with weightcast's own engine",
            )
        return found.aliases

    def _adopted_by(self, manifest: Manifest) -> Callable[[nn.Module, Any, list[Alias]], LiveModel]:
        distrusted = self._distrusted(manifest)
        known = Known(distrusted, [], dict(self._extent.processable.unfit))
        return lambda twin, config, found: VllmModel(twin, config, self.device, known._replace(aliases=found))

    def _mirror_of(
        self, layers: Sequence[LayerTensors], numbers: dict[int, int], landings: list[Placement], manifest: Manifest
    ) -> list[Placement]:
        """The landings, moved from the stand-ins they were recorded in to a mirror; the present one where it fits."""
        slots, landings = plan_mirror(layers, numbers, landings, manifest)
        if self._form != slots:
            taken = {layer.name: layer.layer for layer in layers if layer.name in slots.layers}
            self._mirror, self._form = Mirror(taken, slots.layers, slots.new_memory()), slots
        return landings

    def load_weights(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Load tensors through vLLM's layerwise reload. The broad except is on purpose: the loader is foreign code, and LoadError says
        what the loader raised."""
        try:
            with (
                torch.no_grad(),
                _without_reload_noise(),
                renewed_by_reload(self.model, self._kept),
                api.layerwise_reload(self.model, self._vllm_config),
            ):
                self._load(tensors)
            with torch.no_grad(), api.current_config(self._vllm_config):
                for layer in tied_embeddings(self.model):
                    if layer not in self._mirror:
                        api.quant_method(layer).process_weights_after_loading(layer)
        except WeightcastError:
            raise
        except Exception as error:
            raise LoadError(f"vLLM's loader failed: {type(error).__name__}: {error}", phase="commit") from error

    def load_initial(self) -> None:
        whole = self.model
        if not isinstance(whole, WithDraft):
            self.load_weights(api.checkpoint_tensors(self._vllm_config, whole))
            return
        of_draft = api.checkpoint_tensors(self._vllm_config, whole.draft.model, whole.draft.model_config)
        named = ((PREFIX + name, tensor) for name, tensor in of_draft)
        self.load_weights(chain(api.checkpoint_tensors(self._vllm_config, whole.target), named))

    def checksums(self) -> dict[str, str]:
        """Return the digest of each live tensor. For a layer that takes its weights from the mirror this is the digest of the load
        format.

        Before the first sync, layers that vLLM keeps in packed form outside of their parameters have no digest.
        """
        return checksums_of(self.model, self._mirror.views)

    def _load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.model.load_weights(tensors)  # type: ignore[operator]


class _RuledOut(Exception):
    """Fewer layers than before can be processed beside the engine."""


@contextmanager
def _without_reload_noise() -> Iterator[None]:
    """The reload warns of each layer that got no tensors; here those are the direct ones, which got theirs already."""

    def is_news(record: logging.LogRecord) -> bool:
        return "Failed to load weights" not in record.getMessage()

    source = logging.getLogger(api.RELOAD_LOGGER)
    source.addFilter(is_news)
    try:
        yield
    finally:
        source.removeFilter(is_news)
