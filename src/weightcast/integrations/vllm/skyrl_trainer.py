"""SkyrlTrainer: the trainer-side engine that SkyRL's workers send with."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch.distributed as dist
from skyrl.backends.skyrl_train.weight_sync.weight_senders import SkyrlTrainerCapabilities
from vllm.distributed.weight_transfer.base import WeightSource

from weightcast.errors import Unsupported
from weightcast.integrations.vllm.trainer import WeightcastTrainer, WeightcastTrainerInfo, register

TOKEN = "WEIGHTCAST_TOKEN"


@dataclass
class SkyrlTrainerInfo(WeightcastTrainerInfo):
    """What SkyRL's workers say to be given a SkyrlTrainer."""

    backend: ClassVar[str] = "weightcast_skyrl"

    def __post_init__(self) -> None:
        register(SkyrlTrainer)


class SkyrlTrainer(SkyrlTrainerCapabilities, WeightcastTrainer):  # type: ignore[misc]
    """A Publisher behind the contract of vLLM's trainers, with what SkyRL asks of one beside."""

    init_info_cls = SkyrlTrainerInfo
    skyrl_handles_prefix_cache_reset = True
    """A commit forgets what old weights computed."""

    @classmethod
    def trainer_init(cls, init_info: WeightcastTrainerInfo, *, client: Any, source: WeightSource | None = None) -> Self:
        """Colocated engines sleep while SkyRL makes its trainers, so the first round connects."""
        return cls.unconnected(init_info, client=client, source=source)


def init_info(*, ie_cfg: Any, rank: int, server_urls: list[str], **_: Any) -> SkyrlTrainerInfo:
    """What a rank of SkyRL's trainer publishes to: all of its servers, which may demand a token (WEIGHTCAST_TOKEN)."""
    if getattr(ie_cfg, "speculative_config", None) is not None:
        raise Unsupported(
            "SkyRL syncs a draft model by sessions of its own, which weightcast does not have",
            hint="Set generator.inference_engine.speculative_config=null, or weight_sync_backend=nccl",
        )
    return SkyrlTrainerInfo(
        rank=rank,
        engines=tuple(server_urls),
        token=os.environ.get(TOKEN),
        process_group=dist.group.WORLD,
    )
