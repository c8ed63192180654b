"""The HTTP server in front of an InferenceEngine: OpenAI routes, vLLM's RL routes and weightcast's own control routes.

``create_app`` makes the ASGI application; ``control_router`` alone can be mounted into another server.
Needs the ``server`` extra (starlette); nothing is imported before it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightcast.lazy import lazy_names

if TYPE_CHECKING:
    from weightcast.server.app import create_app
    from weightcast.server.auth import TokenAuth
    from weightcast.server.config import ServerConfig
    from weightcast.server.control import EngineCommitter, EngineControl
    from weightcast.server.control_routes import control_router

__all__ = ["EngineCommitter", "EngineControl", "ServerConfig", "TokenAuth", "control_router", "create_app"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "create_app": "app",
        "TokenAuth": "auth",
        "ServerConfig": "config",
        "EngineCommitter": "control",
        "EngineControl": "control",
        "control_router": "control_routes",
    },
    __all__,
)
