"""The general plug-in: vLLM calls ``register`` in each of its processes, possibly several times."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

from weightcast.errors import Unsupported

BACKEND = "weightcast"
ALLOW_LIST = "VLLM_PLUGINS"
HAS_ADAPTERS = (0, 32)
"""The first version on which adapters of trainers were tried."""

_LOADED_UNASKED = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
)
_ASKED_BY_NAME = frozenset({"lora_hf_hub_resolver"})
"""Plug-ins of vLLM that do something only when the variable names them."""

logger = logging.getLogger(__name__)


def register() -> None:
    """Make the backend known to vLLM; idempotent, and never raises because of vLLM's version.

    vLLM calls this in every process, also where nobody asked for weightcast: a version out of range must not keep such a
    server from starting. Where somebody does ask, the backend that is registered instead says what is wrong.
    """
    import vllm
    from weightcast.engines.vllm.log import log_like_vllm
    from weightcast.engines.vllm.versions import check_version

    log_like_vllm()
    try:
        numbers = check_version(vllm.__version__)
    except Unsupported as error:
        _register_refusal(error)
        return
    import torch
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "weightcast.engines.vllm.backend", "VllmBackend")
    if numbers >= HAS_ADAPTERS:
        from weightcast.engines.vllm.core import install_in_core

        install_in_core()
    if torch.cpu._is_amx_tile_supported():
        # Without it the first short prompt of a server that skipped its warm-up dies of an illegal instruction.
        torch.cpu._init_amx()
    if asks_for_backend(sys.argv):
        allow_routes()


def _register_refusal(error: Unsupported) -> None:
    """Have vLLM raise the error when it makes the backend, and not before."""
    try:
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    except ImportError:
        # Versions without weight transfer: their command line knows no option to ask for it with.
        logger.debug("weightcast has nothing to register with: %s", error)
        return

    class RefusedBackend:
        """Stands for a backend that does not work with this vLLM."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise Unsupported(error.message, hint=error.hint)

    with contextlib.suppress(ValueError):  # registered by an earlier call
        WeightTransferEngineFactory.register_engine(BACKEND, RefusedBackend)


def asks_for_backend(arguments: Sequence[str]) -> bool:
    """Whether a command line names weightcast as the server's weight transfer."""
    for number, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name.lstrip("-").replace("_", "-").partition(".")[0] == "weight-transfer-config":
            return BACKEND in (value or "".join(arguments[number + 1 : number + 2]))
    return False


def allow_routes() -> None:
    """Let vLLM load weightcast's routes, and every other plug-in exactly as it would have without this call.

    vLLM adds a plug-in's routes only where VLLM_PLUGINS names the plug-in. Once that variable is set, it keeps out every plug-in that
    it does not name. Where the variable is not set, this function sets it to weightcast and everything that vLLM would have loaded
    without it. An operator's own list is left alone.
    """
    if ALLOW_LIST in os.environ:
        if BACKEND not in os.environ[ALLOW_LIST].split(","):
            logger.warning("%s does not name weightcast: its /weightcast/* routes are not served", ALLOW_LIST)
        return
    others = {point.name for point in entry_points(group="vllm.endpoint_plugins")} - {BACKEND}
    loaded = {point.name for group in _LOADED_UNASKED for point in entry_points(group=group)}
    if others & loaded:
        logger.warning(
            "set %s to the plug-ins that you want, %s among them: naming it here would also add the routes of %s",
            ALLOW_LIST, BACKEND, ", ".join(sorted(others & loaded)),
        )  # fmt: skip
        return
    os.environ[ALLOW_LIST] = ",".join(sorted((loaded | {BACKEND}) - _ASKED_BY_NAME))
