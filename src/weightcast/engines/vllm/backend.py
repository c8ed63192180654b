"""VllmBackend: weightcast's WeightTransferEngine inside a vLLM worker. A StockWorker does what vLLM asks for, and nothing raises."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine as VllmEngine
from vllm.v1.worker.worker_base import WorkerBase

import vllm
from weightcast.engines.stock.worker import StockWorker, refusal
from weightcast.engines.vllm import api
from weightcast.engines.vllm.adapter_calls import AdapterCalls
from weightcast.engines.vllm.adapters import VllmAdapters
from weightcast.engines.vllm.drafts import draft_of
from weightcast.engines.vllm.left_open import close_when_joined
from weightcast.engines.vllm.lora import without_adapters
from weightcast.engines.vllm.model import VllmModel
from weightcast.engines.vllm.parallelism import worker_rank
from weightcast.engines.vllm.versions import check_version
from weightcast.errors import StateError, WeightcastError
from weightcast.vllm_protocol.eras import CALL
from weightcast.vllm_protocol.eras.base import require_lora
from weightcast.weight_transfer.weightcast import WeightcastInitInfo, WeightcastUpdateInfo

HEARD = "_weightcast_heard"


class VllmBackend(VllmEngine):  # type: ignore[misc]
    """One worker's StockWorker behind vLLM's contract. Outcomes are asked for with ``weightcast_call``."""

    init_info_cls = WeightcastInitInfo
    update_info_cls = WeightcastUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        check_version(vllm.__version__)
        self._worker: Any = None
        self._adapters: AdapterCalls | None = None
        self.calls = StockWorker(worker_rank(vllm_config), self._adopted, api.sleeping_tags)
        install_call()
        hear_sleep()
        close_when_joined(_met_by)

    def meet(self, worker: Any) -> None:
        """Take notice of the worker that this backend belongs to, which has the draft."""
        self._worker = worker

    def _adopted(self) -> VllmModel:
        draft = None if self._worker is None else draft_of(self._worker)
        model = self.model if self.vllm_config.lora_config is None else without_adapters(self.model)
        return VllmModel(model, self.vllm_config, self.device, draft=draft)

    def call(self, action: str, payload: Any) -> dict[str, Any]:
        """A call of weightcast's, about the model or about an adapter that the payload names; never raises."""
        try:
            name = _adapter_of(payload)
            if name:
                return self._adapter_calls().call(name, action, payload)
        except WeightcastError as error:
            return refusal(self.calls.rank, error)
        if action == "shutdown" and self._adapters is not None:
            self._adapters.shutdown()
        record = self.calls.call(action, payload)
        return record if self._adapters is None else {**record, "adapters": self._adapters.served()}

    def _adapter_calls(self) -> AdapterCalls:
        if self._adapters is None:
            require_lora(self.vllm_config)
            self._adapters = AdapterCalls(worker_rank(self.vllm_config), VllmAdapters(self._worker))
        return self._adapters

    def parse_init_info(self, init_dict: dict[str, Any]) -> Any:
        return init_dict

    def parse_update_info(self, update_dict: dict[str, Any]) -> Any:
        return update_dict

    def init_transfer_engine(self, init_info: Any) -> None:
        self.calls.init_transfer_engine(init_info)

    def start_weight_update(self) -> None:
        self.calls.start_weight_update()

    def update_weights(self, update_info: Any) -> None:
        self.calls.update_weights(update_info)

    def receive_weights(self, update_info: Any) -> None:
        self.calls.update_weights(update_info)

    def finish_weight_update(self) -> None:
        self.calls.finish_weight_update()

    def shutdown(self) -> None:
        self.calls.shutdown()
        if self._adapters is not None:
            self._adapters.shutdown()

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """Part of the contract of old versions; weightcast's trainers use a Publisher."""
        raise NotImplementedError("use weightcast.Publisher")


def _adapter_of(payload: Any) -> str:
    """The adapter that a call is about, by the call itself or by a trainer's invitation; empty for the model."""
    if not isinstance(payload, Mapping):
        return ""
    info = payload.get("init_info")
    named = payload.get("adapter") or (info.get("adapter") if isinstance(info, Mapping) else None)
    return str(named or "")


def _met_by(worker: Any) -> bool:
    """Whether a worker's backend is weightcast's, which takes notice of its worker."""
    backend = getattr(worker, "weight_transfer_engine", None)
    if isinstance(backend, VllmBackend):
        backend.meet(worker)
        return True
    return False


def install_call() -> None:
    """Give this process's worker the method that ``collective_rpc`` reaches the backend by; idempotent."""

    def weightcast_call(worker: Any, action: str, payload: Mapping[str, Any] | None = None) -> dict[str, Any]:
        backend = getattr(worker, "weight_transfer_engine", None)
        if not isinstance(backend, VllmBackend):
            error = StateError("this vLLM worker was not started with weightcast's weight transfer")
            return refusal(int(getattr(worker, "rank", 0)), error)
        backend.meet(worker)
        return backend.call(action, {} if payload is None else payload)

    if not hasattr(WorkerBase, CALL):
        setattr(WorkerBase, CALL, weightcast_call)


def hear_sleep() -> None:
    """Have this process's worker say beforehand that it goes to sleep, or wakes up; idempotent. From level 2 on weights do not come
    back."""
    from vllm.v1.worker.gpu_worker import Worker

    sleep, wake_up = Worker.sleep, Worker.wake_up
    if hasattr(sleep, HEARD):
        return

    @wraps(sleep)
    def heard(worker: Any, level: int = 1) -> Any:
        backend = getattr(worker, "weight_transfer_engine", None)
        if isinstance(backend, VllmBackend):
            backend.calls.before_sleep(loses=level >= 2)
        return sleep(worker, level)

    @wraps(wake_up)
    def awaited(worker: Any, *arguments: Any, **named: Any) -> Any:
        backend = getattr(worker, "weight_transfer_engine", None)
        with backend.calls.undisturbed() if isinstance(backend, VllmBackend) else nullcontext():
            return wake_up(worker, *arguments, **named)

    setattr(heard, HEARD, True)
    Worker.sleep, Worker.wake_up = heard, awaited
