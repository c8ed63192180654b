"""SchedulerCalls: weightcast's calls in one scheduler process, carried out on the scheduler's thread between two steps.

Load-bearing: nothing raises out of a call, since an exception would end the scheduler. All tensor-parallel ranks take their orders from one
stream, so they carry out the same call at the same place; the answer has the outcomes of all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from weightcast.commit.order import Serving
from weightcast.commit.worker_outcome import WEIGHTS, outcomes_from
from weightcast.digest.versions import INITIAL_VERSION
from weightcast.engines.sglang.gathering import gather
from weightcast.engines.sglang.messages import WeightcastAnswer, WeightcastOrder, packed, unpacked
from weightcast.engines.sglang.model import SglangModel
from weightcast.engines.sglang.scheduler import standing_scheduler
from weightcast.engines.stock.in_lockstep import update_in_lockstep
from weightcast.engines.stock.worker import StockWorker, refusal
from weightcast.errors import ErrorForm, WeightcastError
from weightcast.weight_transfer.base import WorkerRank

logger = logging.getLogger(__name__)

Record = dict[str, Any]


class SchedulerCalls:
    """The calls of one scheduler; ``worker`` has what is not about scheduling."""

    def __init__(self, scheduler: Any) -> None:
        self._standing = standing_scheduler(scheduler)
        self.held = False
        """The scheduler stands because its weights are of no version, or not those of the other workers."""
        step = self._standing
        self.rank = (step.dp_rank * step.pp_size + step.pp_rank) * step.tp_size + step.tp_rank
        self.worker = StockWorker(
            WorkerRank(rank=self.rank, world_size=self.rank + 1),
            lambda: SglangModel(step.model, step.device, lambda: step.sleeping_tags),
            lambda: step.sleeping_tags,
        )

    def handle(self, order: WeightcastOrder) -> WeightcastAnswer:
        """The outcomes of all tensor-parallel ranks of this replica, or of this stage of it. Broad except on purpose: see the module's
        first lines."""
        try:
            payload = unpacked(order.payload)
            outcomes = self._carry_out(order.action, payload)
        except Exception as error:
            logger.exception("weight transfer: %s failed", order.action)
            outcomes = [refusal(self.rank, ErrorForm.of(error).error())]
        step = self._standing
        return WeightcastAnswer(
            number=order.number, outcomes=packed(outcomes), paused=step.paused, still=step.is_still
        )  # fmt: skip

    @property
    def stands(self) -> bool:
        """Whether this stage of a pipeline may begin no batch."""
        return self._standing.pp_size > 1 and self._standing.paused

    @property
    def answers_itself(self) -> bool:
        """Whether SGLang sends nothing from here to the process that serves requests, and the answer is of this stage."""
        return self._standing.pp_rank > 0 and self._standing.tp_rank == 0

    def before_sleep(self, tags: Sequence[str] | None) -> None:
        """SGLang is about to give memory away. Weights come back with their values only where SGLang keeps a copy of them."""
        args = self._standing.scheduler.server_args
        if args.enable_memory_saver and (not tags or WEIGHTS in tags):
            self.worker.before_sleep(loses=not args.enable_weights_cpu_backup)

    def updated_by_others(self, version: str | None) -> None:
        """SGLang's own routes wrote weights; without a version of their own, tokens must not go on to carry the one before."""
        if self.worker.engine is not None and version is None:
            self._standing.name(INITIAL_VERSION)
        self.worker.replaced(version or INITIAL_VERSION)
        self.held = False

    # -- pieces

    def _carry_out(self, action: str, payload: Mapping[str, Any]) -> list[Record]:
        step = self._standing
        match action:
            case "update":
                return self._update(payload)
            case "pause":
                return self._scheduled(step.forget if payload["clear_cache"] else step.pause)
            case "forget":
                return self._scheduled(step.forget)
            case "resume":
                self.held = False
                return self._scheduled(step.resume)
            case "hold":
                self.held = bool(payload["held"])
                return self._gather(self.worker.call(action, payload))
            case "label":
                return self._scheduled(lambda: step.name(payload["version"]))
            case _:
                return self._gather(self.worker.call(action, payload))

    def _update(self, payload: Mapping[str, Any]) -> list[Record]:
        """An update, and keys and values forgotten before it where ``clear_cache`` says so. Weights of no version are not computed with:
        the scheduler stays paused then."""
        step, was_paused = self._standing, self._standing.paused
        stand = step.forget if payload["clear_cache"] else step.pause
        error = _error_of(stand)
        step.wait_for_device()
        call = self.worker.call if error is None else self._refused(error)
        outcomes = update_in_lockstep(call, payload["info"], self._gather)
        serving = Serving.of(outcomes_from(outcomes))
        self.held = bool(serving.unfit)
        if not serving.unfit and serving.version is not None:
            if serving.error is None:
                step.name(serving.version)
            if not was_paused:
                step.resume()
        return outcomes

    def _scheduled(self, work: Callable[[], None]) -> list[Record]:
        """The outcomes after ``work``, with its error alone: what an update before it came to is none of this call's."""
        error = _error_of(work)
        return self._gather(_with_error(self.worker.call("status", {}), error))

    def _refused(self, error: WeightcastError) -> Callable[[str, Mapping[str, Any]], Record]:
        return lambda action, payload: _with_error(self.worker.call("status", {}), error)

    def _gather(self, record: Record) -> list[Record]:
        return gather(record, self._standing.cpu_group, self._standing.tp_size)


def _error_of(work: Callable[[], None]) -> WeightcastError | None:
    """The error that ``work`` ends with. Broad except on purpose: see the module's first lines."""
    try:
        work()
    except WeightcastError as error:
        return error
    except Exception as error:
        logger.exception("SGLang's scheduler raised")
        return ErrorForm.of(error).error()
    return None


def _with_error(record: Record, error: WeightcastError | None) -> Record:
    """The record with this error, or none, in the place of the one that it has."""
    form = None if error is None else ErrorForm.of(error)
    changed: Record = msgspec.to_builtins(msgspec.structs.replace(outcomes_from([record])[0], error=form))
    return changed
