"""The engine's side of weight transfer as a public contract with vLLM's names."""

from weightcast.weight_transfer.base import InitInfo, UpdateInfo, WeightTransferEngine, WorkerRank
from weightcast.weight_transfer.config import WeightTransferConfig
from weightcast.weight_transfer.factory import WeightTransferEngineFactory

__all__ = [
    "InitInfo",
    "UpdateInfo",
    "WeightTransferConfig",
    "WeightTransferEngine",
    "WeightTransferEngineFactory",
    "WorkerRank",
]
