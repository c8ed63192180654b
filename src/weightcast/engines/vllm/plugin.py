"""The general plug-in: vLLM calls ``register`` in each of its processes, possibly several times."""

from __future__ import annotations

import logging

BACKEND = "weightcast"

logger = logging.getLogger(__name__)


def register() -> None:
    """Make the backend known to vLLM. Raises Unsupported for vLLM versions out of range; idempotent."""
    import torch
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    import vllm
    from weightcast.engines.vllm.versions import check_version

    check_version(vllm.__version__)
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "weightcast.engines.vllm.backend", "VllmBackend")
    if torch.cpu._is_amx_tile_supported():
        # Without it the first short prompt of a server that skipped its warm-up dies of an illegal instruction.
        torch.cpu._init_amx()
