"""A plug-in of vLLM by which the loader of a served engine's worker can be made to raise half-way.

A worker looks into the folder that the variable names whenever weights go through its loader: a file called like its rank says
after how many tensors the loader raises, once. One called ``adapter-`` and the rank has the worker raise in the commit of an adapter.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VARIABLE = "WEIGHTCAST_FAULTY_FOLDER"


def register() -> None:
    """Called by vLLM in each of its processes, maybe twice. The model's class can be imported only once vLLM has loaded one."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    create = WeightTransferEngineFactory.create_engine
    if create.__name__ == "created":
        return

    def created(*args: Any) -> Any:
        _hook_loader()
        _hook_adapters()
        return create(*args)

    WeightTransferEngineFactory.create_engine = created


def _hook_loader() -> None:
    from weightcast.engines.vllm.model import VllmModel

    load = VllmModel.load_weights

    def stumbling(model: VllmModel, tensors: Iterator[tuple[str, Any]]) -> None:
        fault = Path(os.environ[VARIABLE]) / str(model._vllm_config.parallel_config.rank)
        if fault.exists():
            count = int(fault.read_text())
            fault.unlink()
            tensors = _some(tensors, count)
        load(model, tensors)

    VllmModel.load_weights = stumbling  # type: ignore[method-assign]


def _hook_adapters() -> None:
    from weightcast.engines.vllm.adapter_calls import AdapterWorker

    update = AdapterWorker._round

    def stumbling(worker: AdapterWorker, payload: Any) -> None:
        fault = Path(os.environ[VARIABLE]) / f"adapter-{worker.rank}"
        adapter: Any = worker._adapter
        if fault.exists() and payload.get("action") == "commit":
            fault.unlink()

            def stumble(*_: object) -> None:
                del adapter.prepare
                raise ValueError("the worker stumbled")

            adapter.prepare = stumble
        update(worker, payload)

    AdapterWorker._round = stumbling  # type: ignore[method-assign]


def _some(tensors: Iterator[tuple[str, Any]], count: int) -> Iterator[tuple[str, Any]]:
    for number, item in enumerate(tensors):
        if number == count:
            raise ValueError("the loader stumbled")
        yield item
