"""TRL's colocate mode (``use_vllm=True, vllm_mode="colocate"``) over weightcast: TRL's engine in the trainer's process gets its weights by a
Publisher, in place, between TRL's own calls that put the engine to sleep and wake it up.

    sync_weights    weights wake up, and are published
    generate        TRL's own: keys and values wake up, the engine generates, and goes to sleep
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from weightcast.deadline import Deadline
from weightcast.errors import Unsupported
from weightcast.integrations.plug_points import plug_point, put
from weightcast.report.model import Report
from weightcast.sources.streamed import Stream, StreamSource
from weightcast.trainer.clients import VllmClient
from weightcast.trainer.publisher import Publisher

GENERATION = "trl.generation.vllm_generation"
WANTED = "trl>=1.16"
BACKEND = {"backend": "weightcast"}
WAKE_S = 60.0
OWN, MINE = "_trls_own", "_weightcast"


def use_in_colocate_mode(**options: Any) -> None:
    """Have TRL's trainers that are made from now on publish with weightcast in colocate mode.

    Each process publishes to the engine that it has. ``options`` are more arguments of Publisher.
    """
    generation = plug_point(
        f"{GENERATION}:VLLMGeneration", package="trl", wanted=WANTED, members=("sync_weights", "_iter_named_params")
    )
    empty_cache = plug_point(f"{GENERATION}:empty_cache", package="trl", wanted=WANTED)
    llm = plug_point(f"{GENERATION}:LLM", package="trl", wanted="trl[vllm]>=1.16")
    own = getattr(generation.sync_weights, OWN, generation.sync_weights)

    def sync_weights(self: Any) -> Report | None:
        if self.mode != "colocate":
            own(self)
            return None
        if not hasattr(self, MINE):
            setattr(self, MINE, _Colocated(self, empty_cache, options))
        report: Report = getattr(self, MINE).sync(self)
        return report

    setattr(sync_weights, OWN, own)
    generation.sync_weights = sync_weights
    if not isinstance(llm, partial):
        put(f"{GENERATION}:LLM", partial(llm, weight_transfer_config=BACKEND))


class _Colocated:
    """What one of TRL's objects that generate has of weightcast. Nothing here keeps that object alive."""

    def __init__(self, generation: Any, empty_cache: Callable[[], None], options: dict[str, Any]) -> None:
        if generation.tensor_parallel_size > 1:
            raise Unsupported(
                "TRL's colocated engines with tensor parallelism have a worker in each process, and no process reaches all of them",
                hint="Set vllm_tensor_parallel_size=1, or use TRL's server mode",
            )
        stream = weakref.WeakMethod(generation._iter_named_params)
        self._empty_cache = empty_cache
        self._client = VllmClient(generation.llm)
        # Each process has an engine of its own and reads all tensors, as gathering is collective.
        given = {"mode": "in_place", "process_group": None, **options}
        self._publisher = Publisher(StreamSource(partial(_read, stream)), [self._client], **given)

    def sync(self, generation: Any) -> Report:
        """Publish. When that fails, TRL takes the weights to be asleep still, so that its next generation syncs once more."""
        generation._llm_weights_sleeping = generation.enable_sleep_mode
        if generation.enable_sleep_mode:
            self._empty_cache()
            self._client.wake(["weights"], Deadline(WAKE_S))
        report = self._publisher.publish()
        generation._llm_weights_sleeping = False
        return report


def _read(stream: Callable[[], Any]) -> Stream:
    found: Stream = stream()()
    return found
