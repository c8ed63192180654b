"""What weightcast calls of vLLM's engine objects: one contract, one file for each era of their interface.

Used by both sides, the plug-in in a vLLM server and the trainer's clients of engine objects; nothing of vLLM is imported. An era is
told by the calls that an object has, never by a version number, and only here.
"""

from __future__ import annotations

from typing import Any

from weightcast.errors import Unsupported
from weightcast.vllm_protocol.eras import v0_26, v0_27, v0_32
from weightcast.vllm_protocol.eras.adapters import AdapterNames, is_ours
from weightcast.vllm_protocol.eras.base import (
    ADAPTER_CALL,
    BACKEND,
    CALL,
    OfflineEngine,
    ServedEngine,
    has_backend,
    may_sleep,
    require_backend,
    require_sleep_mode,
)

_SERVED: tuple[type[ServedEngine], ...] = (v0_32.Served, v0_27.Served, v0_26.Served)
_OFFLINE: tuple[type[OfflineEngine], ...] = (v0_27.Offline, v0_26.Offline)


def served_engine(client: Any) -> ServedEngine:
    """vLLM's EngineClient in the newest era that it fits; Unsupported when it fits none."""
    return next((era(client) for era in _SERVED if era.fits(client)), None) or _refuse(client)


def offline_engine(llm: Any) -> OfflineEngine:
    """vLLM's ``LLM`` in the newest era that it fits; Unsupported when it fits none."""
    return next((era(llm) for era in _OFFLINE if era.fits(llm)), None) or _refuse(llm)


def _refuse(engine: Any) -> Any:
    raise Unsupported(
        f"a {type(engine).__name__} has none of the interfaces of vLLM that are known",
        hint="weightcast works with vLLM 0.26 to 0.33",
    )


__all__ = [
    "ADAPTER_CALL",
    "BACKEND",
    "CALL",
    "AdapterNames",
    "OfflineEngine",
    "ServedEngine",
    "has_backend",
    "is_ours",
    "may_sleep",
    "offline_engine",
    "require_backend",
    "require_sleep_mode",
    "served_engine",
]
