"""PublishedTo: the half of RayEngineClient that runs in the actor which has the engine."""

from __future__ import annotations

from typing import Any

import msgspec

from weightcast.deadline import Deadline
from weightcast.errors import EngineError, ErrorForm, InvalidInput
from weightcast.trainer.clients.base import EngineClient
from weightcast.trainer.clients.making import make_client


class PublishedTo:
    """Base of a Ray actor's class: ``llm``, an engine object of either kind, takes what a Publisher publishes."""

    llm: Any
    _client: EngineClient | None = None

    def weightcast_call(self, method: str, arguments: tuple[Any, ...], timeout_s: float) -> dict[str, Any]:
        """Carry out a call of EngineClient. For RayEngineClient; broad except on purpose: Ray would wrap an exception."""
        try:
            if getattr(self, "llm", None) is None:
                raise InvalidInput(f"{type(self).__name__} has no engine yet", field="llm", hint="Set its self.llm")
            if self._client is None:
                self._client = make_client(self.llm)
            return {"value": getattr(self._client, method)(*arguments, Deadline(timeout_s))}
        except Exception as error:  # noqa: BLE001
            return {"error": msgspec.to_builtins(ErrorForm.of(error, otherwise=EngineError))}
