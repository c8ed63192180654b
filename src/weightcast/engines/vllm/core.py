"""The engine core's part in adapters: it alone knows which versions requests name, and takes no request for one that is gone.

Load-bearing: a call about an adapter and the arrival of a request are on one thread, the core's, between two steps. A request for a
version that is not registered would have vLLM look for its files inside a step, which ends the engine.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import wraps
from typing import Any

from weightcast.engines.vllm.adapter_calls import THERE
from weightcast.errors import UnknownModel
from weightcast.vllm_protocol.eras import ADAPTER_CALL, CALL, is_ours

logger = logging.getLogger(__name__)

GUARDS = "_weightcast_guards"
KNOWN = "_weightcast_adapters"


def install_in_core() -> None:
    """Give the engine core of this process the call about adapters, and have it refuse requests for versions that are gone. A second
    call does nothing."""
    from vllm.v1.engine.core import EngineCore

    add_request = EngineCore.add_request
    if hasattr(add_request, GUARDS):
        return

    def call_about_adapter(core: Any, action: str, payload: Mapping[str, Any]) -> list[Any]:
        requests = [request.lora_request for request in core.scheduler.requests.values()]
        named = sorted({request.lora_int_id for request in requests if request is not None})
        answers: list[Any] = core.collective_rpc(CALL, None, (action, {**payload, "named": named}), None)
        setattr(core, KNOWN, set.intersection(*(set(answer.pop(THERE, ())) for answer in answers)))
        return answers

    @wraps(add_request)
    def guarded(core: Any, request: Any, *arguments: Any, **options: Any) -> Any:
        adapter = request.lora_request
        if adapter is None or not is_ours(adapter) or adapter.lora_int_id in getattr(core, KNOWN, ()):
            return add_request(core, request, *arguments, **options)
        error = UnknownModel(f"{adapter.lora_name!r} is not there any more, or never was", field="lora_request")
        if not hasattr(core, "_send_error_outputs_to_client"):
            raise error  # an engine in the caller's own process
        logger.warning("request %s is refused: %s", request.request_id, error.message)
        return core._send_error_outputs_to_client([request.request_id], request.client_index)

    setattr(guarded, GUARDS, True)
    setattr(EngineCore, ADAPTER_CALL, call_about_adapter)
    EngineCore.add_request = guarded
