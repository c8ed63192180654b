"""vLLM's own trainer side, with weightcast as one of its backends."""

from weightcast.integrations.vllm.trainer import WeightcastTrainer, WeightcastTrainerInfo

__all__ = ["WeightcastTrainer", "WeightcastTrainerInfo"]
