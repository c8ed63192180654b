"""What the vLLM benchmark adds to a worker: several weight-transfer engines behind one model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class BenchWorker:
    """Mixed into vLLM's worker (``worker_extension_cls``)."""

    def bench_use(self, backend: str) -> str:
        """Make another backend the worker's; they are made when first asked for."""
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

        worker: Any = self
        if not hasattr(worker, "_bench_engines"):
            worker._bench_engines = {worker.vllm_config.weight_transfer_config.backend: worker.weight_transfer_engine}
        engines = worker._bench_engines
        if backend not in engines:
            model = worker.model_runner.get_model()
            engines[backend] = WeightTransferEngineFactory.create_engine(
                SimpleNamespace(backend=backend), worker.vllm_config, worker.device, model
            )
        worker.weight_transfer_engine = engines[backend]
        return type(engines[backend]).__name__

    def bench_layout(self) -> dict[str, int]:
        """How many tensors go direct and how many through the loader, after a publish."""
        worker: Any = self
        layout = worker.weight_transfer_engine.calls.engine.receiver._session.layout
        return {
            "direct": len({p.region.name for p in layout.placements} - set(layout.through_loader)),
            "through_loader": len(layout.through_loader),
        }

    def bench_sums(self) -> dict[str, str]:
        """Checksums of the live parameters."""
        worker: Any = self
        engine = worker.weight_transfer_engine.calls.engine
        return dict(engine.checksums())
