"""VllmBackend: weightcast's WeightTransferEngine inside a vLLM worker.

Load-bearing: nothing raises out of a call. In a tensor-parallel engine an exception would leave the reply queues out of step,
and the next call would read another one's answer. Outcomes are kept and asked for with ``weightcast_call``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

import msgspec
import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine as VllmEngine
from vllm.v1.worker.worker_base import WorkerBase

import vllm
from weightcast.commit.worker_outcome import WorkerOutcome
from weightcast.digest.versions import INITIAL_VERSION
from weightcast.engines.vllm import api
from weightcast.engines.vllm.left_open import close_when_joined
from weightcast.engines.vllm.model import VllmModel
from weightcast.engines.vllm.parallelism import worker_rank
from weightcast.engines.vllm.versions import check_version
from weightcast.errors import ErrorForm, InvalidInput, StateError, WeightcastError
from weightcast.manifest import Manifest, TensorSpec
from weightcast.untrusted.invalid import invalid_input
from weightcast.untrusted.known import known
from weightcast.vllm_protocol.eras import CALL
from weightcast.weight_transfer.config import WeightTransferConfig
from weightcast.weight_transfer.weightcast import WeightcastEngine, WeightcastInitInfo, WeightcastUpdateInfo

logger = logging.getLogger(__name__)

HEARD = "_weightcast_heard"


class VllmBackend(VllmEngine):  # type: ignore[misc]
    """One worker's WeightcastEngine behind vLLM's contract."""

    init_info_cls = WeightcastInitInfo
    update_info_cls = WeightcastUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        check_version(vllm.__version__)
        self._rank = worker_rank(vllm_config)
        self._live: VllmModel | None = None
        self._engine: WeightcastEngine | None = None
        self._error: WeightcastError | None = None
        self._apply_s = 0.0
        self._held = False
        install_call()
        hear_sleep()
        close_when_joined(lambda engine: isinstance(engine, VllmBackend))

    # -- vLLM's contract

    def parse_init_info(self, init_dict: dict[str, Any]) -> Any:
        return init_dict

    def parse_update_info(self, update_dict: dict[str, Any]) -> Any:
        return update_dict

    def init_transfer_engine(self, init_info: Any) -> None:
        self._carry_out(lambda engine: engine.init_transfer_engine(engine.parse_init_info(_mapping(init_info))))

    def start_weight_update(self) -> None:
        self._carry_out(lambda engine: engine.start_weight_update())

    def update_weights(self, update_info: Any) -> None:
        self._carry_out(lambda engine: engine.update_weights(engine.parse_update_info(_mapping(update_info))))

    def receive_weights(self, update_info: Any) -> None:
        self.update_weights(update_info)

    def finish_weight_update(self) -> None:
        """Closes the round whatever became of its update; the first error is the one to keep."""
        error = self._error
        self._carry_out(lambda engine: engine.finish_weight_update())
        self._error = error or self._error

    def shutdown(self) -> None:
        """Leave the trainer; idempotent. An engine that was never asked anything is not made for that."""
        self._error = None
        if self._engine is not None:
            self._carry_out(lambda engine: engine.shutdown())

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """Part of the contract of old versions; weightcast's trainers use a Publisher."""
        raise NotImplementedError("use weightcast.Publisher")

    # -- weightcast's own calls

    def call(self, action: str, payload: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out ``greet``, ``init``, ``update``, ``shutdown``, ``status``, ``hold``, ``checksums`` or ``digests``; never raises.

        Returns a WorkerOutcome. ``hold`` only keeps in mind whether weightcast paused the engine because of its weights: a pause
        outlives the process that asked for it, and whoever heals the engine must be able to tell it from an operator's.
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
                return self._asked(lambda model: {"tensors": model.live_tensors(_manifest(payload))})
            case "hold":
                self._held = bool(payload.get("held"))
            case "status":
                pass
            case _:
                self._error = InvalidInput(f"no such call: {action!r}", field="action")
        return _record(self._outcome())

    def before_sleep(self, level: int) -> None:
        """vLLM is about to unmap this worker's memory: what lies beside it goes as well. From level 2 on weights do not come back.

        Never raises, and what became of the last update stays known.
        """
        if self._engine is None and level < 2:
            return
        before = (self._error, self._apply_s)
        self._carry_out(lambda engine: engine.sleep(loses=level >= 2))
        self._error, self._apply_s = before

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Inside, no memory is given back on another thread than vLLM's: its allocator goes through a list that this would change."""
        if self._engine is None:
            yield
            return
        with self._engine.receiver.undisturbed():
            yield

    def _asked(self, question: Callable[[VllmModel], dict[str, Any]]) -> dict[str, Any]:
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
        """All of an update in one call, so that no step can come in between. One that a client of vLLM's own routes left open is
        closed first."""
        start = time.perf_counter()
        if self._engine is not None:
            self._engine.close_update()
        self.start_weight_update()
        if self._error is None:
            self.update_weights(payload)
        self.finish_weight_update()
        self._apply_s = time.perf_counter() - start

    def _outcome(self) -> WorkerOutcome:
        engine, error = self._engine, self._error
        asleep = api.sleeping_tags()
        return WorkerOutcome(
            rank=self._rank.rank,
            weight_version=engine.weight_version if engine is not None else INITIAL_VERSION,
            digest=engine.digest if engine is not None else "",
            dirty=engine is not None and engine.dirty,
            error=None if error is None else ErrorForm.of(error),
            apply_s=self._apply_s,
            held=self._held,
            asleep=asleep,
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
        if self._engine is None:
            self._engine = WeightcastEngine(WeightTransferConfig(), self._model(), self._rank)
        return self._engine

    def _model(self) -> VllmModel:
        if self._live is None:
            self._live = VllmModel(self.model, self.vllm_config, self.device)
        return self._live


def install_call() -> None:
    """Give this process's worker the method that ``collective_rpc`` reaches the backend by; idempotent."""

    def weightcast_call(worker: Any, action: str, payload: Mapping[str, Any] | None = None) -> dict[str, Any]:
        backend = getattr(worker, "weight_transfer_engine", None)
        if not isinstance(backend, VllmBackend):
            return _no_backend(worker)
        return backend.call(action, {} if payload is None else payload)

    if not hasattr(WorkerBase, CALL):
        setattr(WorkerBase, CALL, weightcast_call)


def hear_sleep() -> None:
    """Have this process's worker say beforehand that it goes to sleep, or wakes up; idempotent."""
    from vllm.v1.worker.gpu_worker import Worker

    sleep, wake_up = Worker.sleep, Worker.wake_up
    if hasattr(sleep, HEARD):
        return

    @wraps(sleep)
    def heard(worker: Any, level: int = 1) -> Any:
        backend = getattr(worker, "weight_transfer_engine", None)
        if isinstance(backend, VllmBackend):
            backend.before_sleep(level)
        return sleep(worker, level)

    @wraps(wake_up)
    def awaited(worker: Any, *arguments: Any, **named: Any) -> Any:
        backend = getattr(worker, "weight_transfer_engine", None)
        with backend.undisturbed() if isinstance(backend, VllmBackend) else nullcontext():
            return wake_up(worker, *arguments, **named)

    setattr(heard, HEARD, True)
    Worker.sleep, Worker.wake_up = heard, awaited


def _no_backend(worker: Any) -> dict[str, Any]:
    error = StateError("this vLLM worker was not started with weightcast's weight transfer")
    return _record(
        WorkerOutcome(
            rank=int(getattr(worker, "rank", 0)), weight_version=INITIAL_VERSION, digest="", dirty=False,
            error=ErrorForm.of(error),
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
