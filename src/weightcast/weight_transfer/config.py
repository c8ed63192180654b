"""WeightTransferConfig: which backend an engine receives weights with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weightcast.errors import InvalidInput


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightTransferConfig:
    """Selects and configures the backend with which an engine receives weights. Unknown fields are refused.

    Attributes:
        backend: the name of a registered WeightTransferEngine.
        wait_for_weights: serve no request before the first sync.
        mode: "staged", "in_place" or "auto"; docs/protocol.md explains the modes.
    """

    backend: str = "weightcast"
    wait_for_weights: bool = False
    mode: str = "auto"

    def __post_init__(self) -> None:
        if not self.backend or not isinstance(self.backend, str):
            raise InvalidInput(f"backend is a name, not {self.backend!r}", field="backend")
        if self.mode not in ("auto", "staged", "in_place"):
            raise InvalidInput(f"mode is auto, staged or in_place, not {self.mode!r}", field="mode")

    @classmethod
    def of(cls, value: WeightTransferConfig | Mapping[str, Any] | None) -> WeightTransferConfig:
        """Make a config of a config, of a mapping (as from JSON), or of None (the defaults)."""
        if value is None:
            return cls()
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise InvalidInput(f"weight_transfer_config is a mapping, not {type(value).__name__}")
        unknown = set(value) - set(cls.__dataclass_fields__)
        if unknown:
            known = ", ".join(cls.__dataclass_fields__)
            raise InvalidInput(f"unknown field {sorted(unknown)[0]!r} in weight_transfer_config; known: {known}")
        return cls(**value)
