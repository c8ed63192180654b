"""Where a round's bytes land: the live storages or a shadow of them, and the area of the loader's tensors."""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch

from weightcast.cuda.wait import wait_stream
from weightcast.deadline import Deadline
from weightcast.errors import ShadowError
from weightcast.layout import Layout
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest
from weightcast.messages import Mode
from weightcast.plan.replay import Replay
from weightcast.receiver.base import LiveModel
from weightcast.receiver.exchange import distinct_copies
from weightcast.receiver.loader_area import LoadedTensors, LoaderArea, area_sizes
from weightcast.receiver.place import Place, choose_place, new_storage
from weightcast.receiver.shadow import Shadow, combined
from weightcast.receiver.taking import taking_memory
from weightcast.receiver.worker_round import RoundId
from weightcast.transports.recent import Recent

logger = logging.getLogger(__name__)

FILL_TIMEOUT_S = 60.0


class Held(NamedTuple):
    """What a memory holds: the values of a round; their digest, where all bytes were read for it, or for that of a former round to which
    what changed was added; and how many rounds ago all were read."""

    round: RoundId
    digest: int | None
    since: int = 0


def make_target(
    model: LiveModel,
    manifest: Manifest,
    layout: Layout,
    wish: str,
    copies: int,
    loaded: LoadedTensors | None,
    deadline: Deadline,
) -> tuple[Mode, Target]:
    """Make a target over a layout of ``with_area``, in the wished mode. "auto" stages where a second copy fits on the device and
    nothing of the engine sleeps: an engine that computes nothing needs no staging, and the memory that it gave up for its sleep is not
    there to be taken.

    Raises ShadowError where "staged" does not fit. Workers of one host make their targets one after the other.
    """
    wish = "staged" if model.always_staged else wish
    if wish == "staged" or (wish == "auto" and not model.asleep_nbytes):
        try:
            with taking_memory(model.device, deadline):
                place = choose_place(
                    model, area_sizes(layout, loaded), copies, host=wish == "staged" and not model.always_staged
                )
                return "staged", Target(model, manifest, layout, place=place, loaded=loaded)
        except ShadowError as error:
            if wish == "staged":
                raise
            logger.info("weights will be written in place: %s", str(error))
    return "in_place", Target(model, manifest, layout, place=None)


class Target:
    """The memory that one round writes, over the layout that ``with_area`` returned.

    ``memory()`` numbers its storages as that layout does. In a staged target these storages are a shadow, which ``swap`` exchanges with
    the live storages. In an in-place target (``place`` is None) these storages are the live ones. Everything that a commit and its way
    back need is allocated when a Target is made.
    """

    def __init__(
        self,
        model: LiveModel,
        manifest: Manifest,
        layout: Layout,
        *,
        place: Place | None,
        loaded: LoadedTensors | None = None,
    ) -> None:
        live = model.memory()
        self._model = model
        self.place = place
        self.staged = place is not None
        self._processing = model.processing
        self._is_arena = (live.is_arena or not live.storages) and (
            self._processing is None or self._processing.is_padded
        )
        self._memories: dict[tuple[int, ...], Memory] = {}
        self._placements = layout.placements
        self._copies_of_live: Recent[Replay] = Recent()
        try:
            self._unprocessed = self._new_unprocessed()
            self.area = self._new_area(layout, loaded) if layout.through_loader else None
            self._shadow = self._new_shadow(manifest, layout, place) if place is not None and live.storages else None
        except (RuntimeError, MemoryError) as error:
            raise ShadowError(f"no memory for the staged copy: {error}", hint="Ask for mode in_place") from error
        # Rounds are received on another stream than the one that filled these.
        self.settle(Deadline(FILL_TIMEOUT_S))
        self._memory = self._combine()
        self.holds: Held | None = None
        """The round whose values ``memory()`` has, as far as that is known."""
        self._live_holds: Held | None = None
        self._other_holds: Held | None = None
        """The same of the live weights, and of the other one of two copies."""

    def _new_area(self, layout: Layout, loaded: LoadedTensors | None) -> LoaderArea:
        """The area of the tensors that only the engine's own loader can place."""
        return LoaderArea(
            layout, lambda nbytes: new_storage(nbytes, self.place, self._model), keeps=self.staged, loaded=loaded
        )

    def _new_unprocessed(self) -> torch.Tensor | None:
        """The memory of the weights that the engine processes after they landed."""
        if self._processing is None:
            return None

        def allocate(nbytes: int) -> torch.Tensor:
            return new_storage(nbytes, self.place, self._model)

        unprocessed = allocate(self._processing.nbytes).zero_()
        self._processing.reserve(unprocessed, allocate if self.staged else None)
        return unprocessed

    def _new_shadow(self, manifest: Manifest, layout: Layout, place: Place) -> Shadow:
        """A second copy of the live storages, for the tensors that land there."""
        num_live = len(self._model.memory().storages)
        landings = [each for each in layout.placements if each.storage < num_live]
        return Shadow(self._model, manifest, landings, place)

    @property
    def shadow_nbytes(self) -> int:
        """The bytes that the target takes beside the live weights."""
        beside = sum(each.nbytes for each in (self._shadow, self.area, self._unprocessed) if each is not None)
        return beside + (self._processing.processed_nbytes if self._processing is not None and self.staged else 0)

    def memory(self) -> Memory:
        """Return the memory that the next round writes."""
        if not self.staged and not self._is_current():
            self._memory = self._combine()
            self.holds = None
        return self._memory

    def renew(self) -> None:
        """Have ``memory()`` be one that nothing reads any more. Called before a round's bytes land, while the engine computes."""
        if self._shadow is not None and self._shadow.renew():
            self._memories.clear()
            self._memory = self._combine()
            self.holds = None

    @property
    def known_memory(self) -> Memory:
        """What ``memory()`` returned last, without a look at the engine: for threads beside the engine's."""
        return self._memory

    def catch_up(self) -> None:
        """Have the memory that the next round writes hold what is live. Done when the call returns."""
        live = self.live_memory()
        if self.staged and live.number != self._memory.number:
            memory = self._memory
            key = (live.number, memory.number)
            copies = distinct_copies(self._placements)
            self._copies_of_live.get(key, lambda: Replay(copies, live, memory)).run()
            self.settle(Deadline(FILL_TIMEOUT_S))
            self.holds = None if self._live_holds is None else self._live_holds._replace(digest=None)

    def compile(self) -> None:
        """Compile what ``swap`` runs, while the engine computes."""
        if self._shadow is not None:
            self._shadow.compile()
        if self._processing is not None and self.staged:
            self._processing.compile()

    def warm_up(self, deadline: Deadline) -> None:
        """Have the model prepare for ``swap`` while the engine computes. All bytes of the round are staged."""
        if self._shadow is not None:
            self._shadow.warm_up()
        if self._processing is not None:
            self._processing.process()
            self.settle(deadline)

    def swap(self) -> None:
        """Make the staged direct landings live and keep the former values. A second call undoes the first one.

        On a GPU the work is queued on the current stream; ``settle`` waits for it.
        """
        if self._shadow is not None:
            self._shadow.swap()
            self._memory = self._combine()
        if self._shadow is not None and self._shadow.alternates:
            self.holds, self._other_holds, self._live_holds = self._other_holds, self.holds, self.holds
        else:
            self.holds, self._live_holds = self._live_holds, self.holds
        if self._processing is not None:
            self._processing.exchange()
            self.holds = None  # the unprocessed weights stay those of the last round: nothing can be repeated there

    def process_in_place(self) -> None:
        """Have the engine process what landed in place. On a GPU the work is queued on the current stream."""
        if self._processing is not None:
            self._processing.process_in_place()

    def keep_loader_tensors(self) -> None:
        """Count the tensors that are staged for the loader as live from now on. The version before them stays until the next round
        overwrites it."""
        if self.area is not None:
            self.area.keep()
            self._memory = self._combine()

    def take_back_loader_tensors(self) -> None:
        """Count the version before the last ``keep_loader_tensors`` as live again."""
        if self.area is not None:
            self.area.take_back()
            self._memory = self._combine()

    def close(self) -> None:
        """Give up everything beside the live weights. Only ``place`` and ``staged`` can be asked for afterwards."""
        if self._shadow is not None:
            self._shadow.close()
        self._shadow = self.area = self._unprocessed = self._processing = None
        self._memories.clear()
        self._copies_of_live.clear()
        self._memory = Memory([])

    def settle(self, deadline: Deadline) -> None:
        """Return when a swap is done on the GPU as well."""
        if self._model.device.type == "cuda":
            wait_stream(self._model.device, deadline, "making the staged weights live")

    def landed_digest(self) -> int | None:
        """Return the digest of what the last swap made live, where the swap took a digest; otherwise None."""
        whole = self._shadow is not None and self.area is None and self._unprocessed is None
        return self._shadow.landed_digest() if self._shadow is not None and whole else None

    @property
    def moves(self) -> bool:
        """True when a swap makes the staged storages themselves live, so that the digest of the staged bytes is the digest of the live
        bytes."""
        return self.staged and (self._shadow is None or self._shadow.moves)

    def loaded(self) -> LoadedTensors | None:
        """Return what is live through the loader, for the target of the next trainer."""
        return None if self.area is None else self.area.loaded()

    def live_memory(self) -> Memory:
        """Return the live direct landings, and the loader's tensors as the loader was given them."""
        area = None if self.area is None else self.area.live if self.area.live is not None else self.area.staged
        return self._known(self._model.memory(), area)

    def _combine(self) -> Memory:
        direct = self._shadow.memory if self._shadow is not None else self._model.memory()
        return self._known(direct, None if self.area is None else self.area.staged)

    def _known(self, direct: Memory, area: torch.Tensor | None) -> Memory:
        """The memory of some storages; the same object whenever they come round again, so that what transports and
        digests compiled for it is found."""
        storages = [*direct.storages, *(each for each in (self._unprocessed, area) if each is not None)]
        key = tuple(storage.data_ptr() for storage in storages)
        if key not in self._memories:
            self._memories[key] = combined(storages, self._model, is_arena=self._is_arena)
        return self._memories[key]

    def _is_current(self) -> bool:
        live = self._model.memory().storages
        return all(mine is theirs for mine, theirs in zip(self._memory.storages, live, strict=False))
