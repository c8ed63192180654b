"""SglangEngine: an SGLang engine as a commit asks it, from the process that serves requests. For the event loop of its TokenizerManager.

Load-bearing: an answer is told from the answers to calls that were given up by its number. A commit of one replica needs no pause:
its schedulers carry it out between two steps, see ``worker``. Replicas have no step in common, so they are paused.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqInput
from sglang.utils import TypeBasedDispatcher

from weightcast.commit.stock import StockEngine
from weightcast.commit.worker_outcome import KEYS_AND_VALUES, WEIGHTS, first_error, outcomes_from
from weightcast.engines.sglang.messages import WeightcastAnswer, WeightcastOrder, packed, unpacked
from weightcast.engines.sglang.refused import refuse_settings
from weightcast.errors import Unsupported, WeightcastError

LOOK_S = 0.01
"""How often a pause looks whether the last request has ended."""


@dataclass(slots=True)
class _Call:
    """A call on its way: what becomes of it, and the answers so far."""

    done: asyncio.Future[list[WeightcastAnswer]]
    answers: list[WeightcastAnswer] = field(default_factory=list)


class SglangEngine(StockEngine):
    """The engine behind one TokenizerManager."""

    product = "SGLang"
    tags_by_name = (WEIGHTS, KEYS_AND_VALUES, "cuda_graph")

    def __init__(self, manager: Any) -> None:
        self.manager = manager
        self._args = manager.server_args
        self._calls: dict[int, _Call] = {}
        self._numbers = itertools.count(1)
        self._may_be_paused = False
        """Weightcast paused a scheduler, or a scheduler said that it stands."""
        self._is_still = True
        """No batch was on its way through a pipeline when its stages answered last."""
        manager._result_dispatcher += TypeBasedDispatcher([(WeightcastAnswer, self._answered)])

    # -- what commits ask

    @property
    def in_one_step(self) -> bool:
        return self._num_parts == 1

    @property
    def model_name(self) -> str:
        return str(self._args.served_model_name or self._args.model_path)

    def world_size(self, include_dp: bool = True) -> int:
        size = int(self._args.tp_size) * int(self._args.pp_size)
        return size * self._num_replicas if include_dp else size

    def require_backend(self) -> None:
        """Raise Unsupported for a setting of this engine that weights cannot be transferred with."""
        refuse_settings(self._args)

    async def call_workers(self, action: str, payload: Mapping[str, Any]) -> list[Any]:
        self.manager.auto_create_handle_loop()
        number = next(self._numbers)
        call = self._calls[number] = _Call(asyncio.get_running_loop().create_future())
        try:
            self.manager._dispatch_to_scheduler(
                WeightcastOrder(mode="in_place", number=number, action=action, payload=packed(dict(payload)))
            )
            answers = await call.done
        finally:
            del self._calls[number]
        self._may_be_paused = any(answer.paused for answer in answers)
        self._is_still = all(answer.still for answer in answers)
        return [outcome for answer in answers for outcome in unpacked(answer.outcomes)]

    async def update(self, info: Mapping[str, Any], clear_cache: bool) -> list[Any]:
        return await self.call_workers("update", {"info": dict(info), "clear_cache": clear_cache})

    async def is_paused(self) -> bool:
        """Also a pause by SGLang's own route; a pause that was ended by it is asked for."""
        if self._may_be_paused and not self.manager.is_pause:
            await self.call_workers("status", {})
        return bool(self.manager.is_pause or self._may_be_paused)

    async def pause(self, mode: str, clear_cache: bool) -> None:
        """Stop all replicas between two steps. Mode "wait" ends the running requests first, "abort" gives them up; new ones wait."""
        if mode != "keep":
            async with self.manager.is_pause_cond:
                self.manager.is_pause = True
            while self.manager.rid_to_state:
                if mode == "abort":
                    self.manager.abort_request(abort_all=True)
                await asyncio.sleep(LOOK_S)
        if int(self._args.pp_size) == 1:
            await self._done("pause", {"clear_cache": clear_cache})
            return
        await self._done("pause", {"clear_cache": False})
        while not self._is_still:
            await asyncio.sleep(LOOK_S)
            await self.call_workers("status", {})
        if clear_cache:
            await self.forget_cache()

    async def resume(self) -> None:
        await self._done("resume", {})
        async with self.manager.is_pause_cond:
            self.manager.is_pause = False
            self.manager.is_pause_cond.notify_all()

    async def forget_cache(self) -> None:
        await self._done("forget", {})

    async def set_label(self, version: str) -> None:
        """Schedulers have named it already where tokens carry versions."""
        self.manager._update_weight_version_if_provided(version)

    def is_ready(self) -> bool:
        """Whether SGLang itself takes requests. Older versions do not tell."""
        tells = getattr(self.manager, "is_ready", None)
        return tells is None or bool(tells())

    def num_requests(self) -> int | None:
        return len(self.manager.rid_to_state)

    def may_sleep(self) -> bool:
        return bool(self._args.enable_memory_saver)

    def require_sleep(self) -> None:
        if not self.may_sleep():
            raise Unsupported(
                "this SGLang was started without its memory saver, so it cannot sleep",
                hint="Start it with --enable-memory-saver, or publish without wake=",
            )

    async def wake_up(self, tags: Sequence[str]) -> None:
        await self.manager.resume_memory_occupation(ResumeMemoryOccupationReqInput(tags=list(tags)), None)

    # -- pieces

    @property
    def _num_replicas(self) -> int:
        return int(self._args.dp_size)

    @property
    def _num_parts(self) -> int:
        """Groups of schedulers that have no step in common: replicas, and the stages of their pipelines."""
        return self._num_replicas * int(self._args.pp_size)

    def _answered(self, answer: WeightcastAnswer) -> None:
        call = self._calls.get(answer.number)
        if call is None:
            return
        call.answers.append(answer)
        if len(call.answers) == self._num_parts and not call.done.done():
            call.done.set_result(call.answers)

    async def _done(self, action: str, payload: Mapping[str, Any]) -> None:
        """A call of every scheduler that raises what any of them ends with."""
        error: WeightcastError | None = first_error(outcomes_from(await self.call_workers(action, payload)))
        if error is not None:
            raise error
