"""ServerContext: what the route groups of one application share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from weightcast.engines.base import HoldsAdapters, InferenceEngine
from weightcast.server.active import ActiveRequests
from weightcast.server.auth import TokenAuth
from weightcast.server.config import ServerConfig
from weightcast.server.lenient import LenientBodies
from weightcast.server.metrics import ServerMetrics
from weightcast.server.replies import RequestRefused


@dataclass(slots=True, kw_only=True)
class ServerContext:
    """One engine, how to serve it, and what is in flight."""

    engine: InferenceEngine
    config: ServerConfig
    metrics: ServerMetrics = field(default_factory=ServerMetrics)
    active: ActiveRequests = field(default_factory=ActiveRequests)
    created: int = field(default_factory=lambda: int(time.time()))
    token_auth: TokenAuth = field(init=False)
    bodies: LenientBodies = field(init=False)

    def __post_init__(self) -> None:
        self.token_auth = TokenAuth(self.config.token)
        self.bodies = LenientBodies(self.config.max_body_nbytes)

    @property
    def model_name(self) -> str:
        return self.config.served_model_name or self.engine.model_name

    def adapter_of(self, name: str | None) -> str | None:
        """The adapter that a request names, with its version if the request has one; None for the model itself. RequestRefused (404)
        when a request names what is not served."""
        if name is None or name == self.model_name:
            return None
        adapters = self.engine.adapter_names if isinstance(self.engine, HoldsAdapters) else ()
        if name.partition("@")[0] in adapters:
            return name
        served = ", ".join(map(repr, (self.model_name, *adapters)))
        raise RequestRefused(
            404, f"the model {name!r} is not served here, only {served}", kind="NotFound", param="model"
        )
