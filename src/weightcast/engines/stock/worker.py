"""StockWorker: weightcast's calls in one worker of a stock engine. It runs on whichever thread the engine's model runs on.

Load-bearing: nothing raises out of a call. In an engine of several workers an exception would leave the queues of replies out of step,
and the next call would read another one's answer; in a scheduler's own thread it would end the scheduler. What a call came to is
kept, and is part of every later answer until the next call that does something.
"""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec

from weightcast.commit.worker_outcome import WorkerOutcome
from weightcast.content.live_tensors import LiveTensor
from weightcast.digest.versions import INITIAL_VERSION
from weightcast.errors import ErrorForm, InvalidInput, StateError, Unsupported, WeightcastError
from weightcast.manifest import Manifest, TensorSpec
from weightcast.receiver.base import LiveModel
from weightcast.untrusted.invalid import invalid_input
from weightcast.untrusted.known import known
from weightcast.weight_transfer.base import WorkerRank
from weightcast.weight_transfer.config import WeightTransferConfig
from weightcast.weight_transfer.weightcast import WeightcastEngine, WeightcastInitInfo

logger = logging.getLogger(__name__)


class StockModel(LiveModel):
    """The model of one worker, as its stock engine built and loaded it."""

    @abstractmethod
    def live_tensors(self, manifest: Manifest) -> dict[str, LiveTensor]:
        """What lies here of each tensor of a checkpoint; changes nothing. Raises what ``layout`` does."""


class StockWorker:
    """One worker's WeightcastEngine, and what its last call came to. Neither engine nor model is made before it is needed."""

    def __init__(
        self,
        rank: WorkerRank,
        adopt: Callable[[], LiveModel],
        sleeping_tags: Callable[[], tuple[str, ...]] = tuple,
    ) -> None:
        """``adopt`` makes the engine's model a live model. ``sleeping_tags`` says what of this worker's memory is unmapped now."""
        self.engine: WeightcastEngine | None = None
        self._rank = rank
        self._adopt = adopt
        self._sleeping_tags = sleeping_tags
        self._live: LiveModel | None = None
        self._error: WeightcastError | None = None
        self._apply_s = 0.0
        self._held = False

    @property
    def rank(self) -> int:
        """The worker's rank over all replicas."""
        return self._rank.rank

    # -- the five calls of weight_transfer.base

    def init_transfer_engine(self, init_info: Any) -> None:
        self._carry_out(lambda engine: engine.init_transfer_engine(engine.parse_init_info(_mapping(init_info))))

    def start_weight_update(self) -> None:
        self._carry_out(lambda engine: engine.start_weight_update())

    def update_weights(self, update_info: Any) -> None:
        self._carry_out(lambda engine: engine.update_weights(engine.parse_update_info(_mapping(update_info))))

    def finish_weight_update(self) -> None:
        """Closes the round whatever became of its update; the first error is the one to keep."""
        error = self._error
        self._carry_out(lambda engine: engine.finish_weight_update())
        self._error = error or self._error

    def shutdown(self) -> None:
        """Leave the trainer; idempotent. An engine that was never asked anything is not made for that."""
        self._error = None
        if self.engine is not None:
            self._carry_out(lambda engine: engine.shutdown())

    # -- weightcast's own calls

    def call(self, action: str, payload: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out ``greet``, ``init``, ``update``, ``shutdown``, ``status``, ``hold``, ``checksums`` or ``digests``; never raises.

        Returns a WorkerOutcome in builtin types. ``hold`` only keeps in mind whether weightcast paused the engine because of its
        weights: a pause outlives the process that asked for it, and whoever heals the engine must be able to tell it from an operator's.
        """
        if not isinstance(payload, Mapping):
            self._error = InvalidInput("the payload of a call is an object", field="payload")
            return _record(self._outcome())
        match action:
            case "greet":
                self._join(payload, lambda engine, info: engine.greet(info))
            case "init":
                self._join(payload, lambda engine, info: engine.init_transfer_engine(info))
            case "update":
                self._round(payload)
            case "shutdown":
                self.shutdown()
            case "checksums":
                return self._asked(lambda model: {"checksums": model.checksums()})
            case "digests":
                return self._asked(lambda model: {"tensors": _tells(model).live_tensors(_manifest(payload))})
            case "hold":
                self._held = bool(payload.get("held"))
            case "status":
                pass
            case _:
                self._error = InvalidInput(f"no such call: {action!r}", field="action")
        return _record(self._outcome())

    def before_sleep(self, *, loses: bool) -> None:
        """The engine is about to unmap this worker's memory: what lies beside it goes as well. ``loses``: weights do not come back.

        Never raises, and what became of the last update stays known.
        """
        if self.engine is None and not loses:
            return
        before = (self._error, self._apply_s)
        self._carry_out(lambda engine: engine.sleep(loses=loses))
        self._error, self._apply_s = before

    def replaced(self, version: str) -> None:
        """Somebody else wrote weights: see Receiver.replaced. Never raises, and what became of the last update stays known."""
        if self.engine is None:
            return
        before = (self._error, self._apply_s)
        self._carry_out(lambda engine: engine.replaced(version))
        self._error, self._apply_s = before

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Inside, no memory is given back on another thread than this one: an engine's allocator may go through a list that this would
        change."""
        if self.engine is None:
            yield
            return
        with self.engine.receiver.undisturbed():
            yield

    # -- pieces

    def _asked(self, question: Callable[[LiveModel], dict[str, Any]]) -> dict[str, Any]:
        """Answer about the model, not about an engine: asking must not settle who this worker is, which only joining tells. What
        became of the last update stays known, too."""
        before, answer = (self._error, self._apply_s), dict[str, Any]()

        def ask() -> None:
            model = self._model()
            if asleep := model.why_asleep():
                raise StateError(f"the engine is asleep: {asleep}", hint="Wake its weights up, then ask again")
            answer.update(question(model))

        self._keep_error(ask)
        record = _record(msgspec.structs.replace(self._outcome(), **answer))
        self._error, self._apply_s = before
        return record

    def _join(self, payload: Mapping[str, Any], step: Callable[[WeightcastEngine, WeightcastInitInfo], object]) -> None:
        """A step of joining (see commit.joining), with ``init_info``, and ``world_size``: how many workers were asked, all replicas
        included."""

        def join(engine: WeightcastEngine) -> None:
            info = dict(_mapping(payload.get("init_info")))
            if "world_size" in payload:
                info.setdefault("world_size", payload["world_size"])
            step(engine, engine.parse_init_info(info))

        self._carry_out(join)

    def _round(self, payload: Mapping[str, Any]) -> None:
        """All of an update in one call, so that no step can come in between. One that a client of the engine's own routes left open is
        closed first."""
        start = time.perf_counter()
        if self.engine is not None:
            self.engine.close_update()
        self.start_weight_update()
        if self._error is None:
            self.update_weights(payload)
        self.finish_weight_update()
        self._apply_s = time.perf_counter() - start

    def _outcome(self) -> WorkerOutcome:
        engine, error = self.engine, self._error
        return WorkerOutcome(
            rank=self._rank.rank,
            weight_version=engine.weight_version if engine is not None else INITIAL_VERSION,
            digest=engine.digest if engine is not None else "",
            dirty=engine is not None and engine.dirty,
            error=None if error is None else ErrorForm.of(error),
            apply_s=self._apply_s,
            held=self._held,
            asleep=self._sleeping_tags(),
            is_greeting=engine is not None and engine.receiver.is_greeting,
            num_syncs=engine.receiver.num_commits if engine is not None else 0,
        )

    def _carry_out(self, work: Callable[[WeightcastEngine], None]) -> None:
        self._keep_error(lambda: work(self._made()))

    def _keep_error(self, work: Callable[[], None]) -> None:
        """Run it and keep its error. Broad except on purpose: see the module's first lines."""
        self._error = None
        start = time.perf_counter()
        try:
            work()
        except WeightcastError as error:
            self._error = error
            logger.warning("weight transfer: %s", error, exc_info=error.__cause__)
        except Exception as error:
            logger.exception("weight transfer failed")
            self._error = ErrorForm.of(error).error()
        self._apply_s = time.perf_counter() - start

    def _made(self) -> WeightcastEngine:
        if self.engine is None:
            self.engine = WeightcastEngine(WeightTransferConfig(), self._model(), self._rank)
        return self.engine

    def _model(self) -> LiveModel:
        if self._live is None:
            self._live = self._adopt()
        return self._live


def _tells(model: LiveModel) -> StockModel:
    if not isinstance(model, StockModel):
        raise Unsupported("only the model says where the tensors of a checkpoint lie, and adapters do not")
    return model


def refusal(rank: int, error: WeightcastError) -> dict[str, Any]:
    """The answer of a worker that has no StockWorker."""
    return _record(
        WorkerOutcome(
            rank=rank, weight_version=INITIAL_VERSION, digest="", dirty=False, error=ErrorForm.of(error)
        )
    )  # fmt: skip


def _record(outcome: WorkerOutcome) -> dict[str, Any]:
    record: dict[str, Any] = msgspec.to_builtins(outcome)
    return record


def _manifest(payload: Mapping[str, Any]) -> Manifest:
    """The checkpoint that ``tensors`` describes."""
    try:
        return Manifest.of(msgspec.convert(payload.get("tensors"), known(list[TensorSpec])))
    except msgspec.ValidationError as error:
        raise invalid_input(error, what="tensors") from None


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidInput(f"an object with named fields is needed, not {type(value).__name__}")
    return value
