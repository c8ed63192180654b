"""ServerConfig: what the routes need to know besides the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from weightcast.errors import InvalidInput
from weightcast.untrusted.secret import usable_token


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """How one application serves one engine.

    ``token`` guards everything that changes weights or stops requests; without one only loopback clients are let in.
    ``api_key`` guards /v1. ``dtype`` and ``weight_transfer_config`` are reported by /server_info.
    """

    served_model_name: str | None = None
    """None: the engine's own name."""
    token: str | None = field(default=None, repr=False)
    api_key: str | None = field(default=None, repr=False)
    max_body_nbytes: int = 64 << 20
    weight_call_timeout_s: float = 1800.0
    """Longest time that one weight call may take before its caller gets an answer."""
    dtype: str = "auto"
    """What the model computes in, once that is known."""
    weight_transfer_config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("token", "api_key"):
            object.__setattr__(self, name, usable_token(getattr(self, name), field=name))
        if self.max_body_nbytes <= 0:
            raise InvalidInput("max_body_nbytes must be positive", field="max_body_nbytes")
        if not self.weight_call_timeout_s > 0:
            raise InvalidInput("weight_call_timeout_s must be positive", field="weight_call_timeout_s")
