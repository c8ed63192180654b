"""What is called of SGLang's scheduler, on the scheduler's own thread between two steps: one class for each interface that it has had.

An era is told by the calls that a scheduler has, never by a version number, and only here.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from sglang.srt.managers.io_struct import ContinueGenerationReqInput, PauseGenerationReqInput

from weightcast.errors import EngineError, Unsupported

logger = logging.getLogger(__name__)


class StandingScheduler:
    """SGLang 0.5.16 to 0.5.18: outputs carry the version that the server names when they leave it."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        place = getattr(scheduler, "ps", None)
        if place is None:
            from sglang.srt.runtime_context import get_parallel

            place = get_parallel()
        self.tp_rank, self.tp_size = int(place.tp_rank), int(place.tp_size)
        self.pp_rank, self.pp_size = int(place.pp_rank), int(place.pp_size)
        self.dp_rank = int(place.dp_rank or 0)

    @staticmethod
    def fits(scheduler: Any) -> bool:
        """Whether the scheduler has the calls of this era."""
        return all(hasattr(scheduler, name) for name in ("pause_generation", "continue_generation", "flush_cache"))

    @property
    def model(self) -> torch.nn.Module:
        model: torch.nn.Module = self.scheduler.tp_worker.model_runner.model
        return model

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def cpu_group(self) -> Any:
        """The group of the tensor-parallel ranks, which take their orders from one stream."""
        from sglang.srt.distributed import get_tp_group

        return get_tp_group().cpu_group

    @property
    def paused(self) -> bool:
        return bool(self.scheduler._engine_paused)

    @property
    def is_still(self) -> bool:
        """Whether no batch is on its way through the stages of a pipeline. All stages say the same of the same order, as they take the
        same steps between their orders."""
        return self.pp_size == 1 or all(batch is None or batch.is_empty() for batch in self.scheduler.mbs)

    @property
    def sleeping_tags(self) -> tuple[str, ...]:
        """The memory that ``release_memory_occupation`` gave away. Without SGLang's memory saver all of it is still there."""
        if not self.scheduler.server_args.enable_memory_saver:
            return ()
        return tuple(sorted(self.scheduler.weight_updater.offload_tags))

    def wait_for_device(self) -> None:
        """Wait for the step that was launched last: its kernels read the weights."""
        if self.device.type != "cpu":
            torch.get_device_module(self.device.type).synchronize()

    def pause(self) -> None:
        """Compute nothing from now on; what is in flight stays as it is."""
        self.scheduler.pause_generation(PauseGenerationReqInput(mode="in_place"))

    def resume(self) -> None:
        """Go on computing."""
        self.scheduler.continue_generation(ContinueGenerationReqInput(torch_empty_cache=False))

    def forget(self) -> None:
        """Drop all keys and values; requests in flight are queued again and recompute theirs. EngineError when SGLang refuses.

        The scheduler is paused after that, also where this raises.
        """
        self._retract()
        # Older schedulers do not flush while requests wait, which hold no keys and values: they were retracted.
        waiting, self.scheduler.waiting_queue = self.scheduler.waiting_queue, type(self.scheduler.waiting_queue)()
        try:
            flushed = self.scheduler.flush_cache(empty_cache=False)
        finally:
            self.scheduler.waiting_queue = waiting
        if not flushed:
            raise EngineError(
                "SGLang keeps keys and values that former weights computed",
                hint="Publish again when fewer requests are in flight",
            )

    def name(self, version: str) -> None:
        """Name the version that tokens from now on are of."""
        return

    def _retract(self) -> None:
        """Pause, and queue what is in flight again. SGLang does so for one batch; a pipeline has one for each of its stages, or more."""
        scheduler = self.scheduler
        if self.pp_size == 1:
            scheduler.pause_generation(PauseGenerationReqInput(mode="retract"))
            return
        self.pause()
        if not self.is_still:
            raise EngineError("a batch is still on its way through SGLang's pipeline", hint="Publish again")
        here = scheduler.running_batch
        for number, batch in enumerate(scheduler.running_mbs):
            scheduler.running_batch, scheduler.last_batch = batch, scheduler.last_mbs[number]
            scheduler.pause_generation(PauseGenerationReqInput(mode="retract"))
            scheduler.last_mbs[number] = None
        scheduler.running_batch, scheduler.last_batch = here, None


class SpanningScheduler(StandingScheduler):
    """SGLang 0.5.19 and later: outputs say which version made which tokens."""

    @staticmethod
    def fits(scheduler: Any) -> bool:
        return StandingScheduler.fits(scheduler) and hasattr(scheduler, "record_weight_version_change")

    def name(self, version: str) -> None:
        """Name the version that tokens from now on are of. The token of a step whose result is still to come is of the former version,
        and SGLang has not counted that token yet."""
        in_flight = [request for request in self._in_flight() if not request.finished()]
        before = {id(request): len(request.weight_version_events) for request in in_flight}
        former = self._current()
        self.scheduler.record_weight_version_change(new_version=version)
        if version == former:
            return
        from sglang.srt.utils.weight_versions import WeightVersionEvent

        for request in in_flight:
            del request.weight_version_events[before[id(request)] :]
            request.weight_version_events.append(
                WeightVersionEvent(old_version=former, num_output_tokens=len(request.output_ids) + 1)
            )

    def _current(self) -> str:
        from sglang.srt.runtime_context import get_serving

        return str(get_serving().weight_version)

    def _in_flight(self) -> list[Any]:
        """Requests that the results to come bring a token each. A prompt that is computed in pieces gets none before its last piece."""
        queue = getattr(self.scheduler, "result_queue", None) or ()
        return [request for batch, _ in queue for request in batch.reqs if request is not self.scheduler.chunked_req]


_ERAS: tuple[type[StandingScheduler], ...] = (SpanningScheduler, StandingScheduler)


def standing_scheduler(scheduler: Any) -> StandingScheduler:
    """The scheduler in the newest era that it fits; Unsupported when it fits none."""
    for era in _ERAS:
        if era.fits(scheduler):
            return era(scheduler)
    raise Unsupported(
        f"a {type(scheduler).__name__} has none of the interfaces of SGLang's scheduler that are known",
        hint="weightcast works with SGLang 0.5.16 to 0.5.23",
    )
