"""SkyRL: weightcast as a backend of its weight sync, by config alone.

trainer.override_entrypoint=weightcast.integrations.skyrl
generator.inference_engine.weight_sync_backend=weightcast

SkyRL has its backends in tables and functions of its own modules, in the processes of its driver and of its workers; ``main`` has each of
them call ``register``.
"""

from __future__ import annotations

import sys
from typing import Any

from weightcast.integrations.plug_points import plug_point, put

BACKEND = "weightcast"
WANTED = "skyrl>=0.4"
SYNC = "skyrl.backends.skyrl_train.weight_sync"
SENDERS = f"{SYNC}.weight_senders"
UTILS = "skyrl.train.utils.utils"
LIKE = "nccl"
"""SkyRL's backend whose place ours takes: what SkyRL checks about it holds for ours."""
OWN = "_skyrls_own"


def main() -> None:
    """Train as ``python -m skyrl.train.entrypoints.main_base`` does, with weightcast in all processes."""
    register()
    _allow_megatron()
    _have_workers_register()
    sys.argv = [given for given in sys.argv if not given.startswith("trainer.override_entrypoint=")]
    plug_point("skyrl.train.entrypoints.main_base:main", package="skyrl", wanted=WANTED)()


def register() -> None:
    """Make the backend known to SkyRL in this process; idempotent. Nothing of vLLM is imported."""
    backends = plug_point(f"{SYNC}:_VLLM_RECEIVE_BACKENDS", package="skyrl", wanted=WANTED)
    strategy = plug_point(f"{SYNC}:get_transfer_strategy", package="skyrl", wanted=WANTED)
    if hasattr(strategy, OWN):
        return
    backends[BACKEND] = BACKEND

    def get_transfer_strategy(weight_sync_backend: str, colocate_all: bool) -> str:
        if weight_sync_backend != BACKEND:
            return str(strategy(weight_sync_backend, colocate_all))
        # SkyRL asks before it sends, and the module that sends is one of those that import vLLM.
        if SENDERS in sys.modules:
            _register_sender()
        return BACKEND

    setattr(get_transfer_strategy, OWN, strategy)
    name = get_transfer_strategy.__name__
    for module in [each for each in sys.modules if each.startswith("skyrl.")]:
        if vars(sys.modules[module]).get(name) is strategy:
            put(f"{module}:{name}", get_transfer_strategy)


def _register_sender() -> None:
    build = plug_point(f"{SENDERS}:_build_sender_init_info", package="skyrl", wanted=WANTED)
    if hasattr(build, OWN):
        return

    def _build_sender_init_info(*, backend: str, **given: Any) -> tuple[Any, Any]:
        if backend != BACKEND:
            found: tuple[Any, Any] = build(backend=backend, **given)
            return found
        from weightcast.integrations.vllm.skyrl_trainer import init_info

        return init_info(**given), None

    setattr(_build_sender_init_info, OWN, build)
    put(f"{SENDERS}:_build_sender_init_info", _build_sender_init_info)


def _allow_megatron() -> None:
    """SkyRL names the backends that it has for Megatron."""
    place = f"{UTILS}:validate_megatron_cfg"
    validate = plug_point(place, package="skyrl", wanted=WANTED)

    def validate_megatron_cfg(cfg: Any) -> None:
        engines = cfg.generator.inference_engine
        given = engines.weight_sync_backend
        if given == BACKEND:
            engines.weight_sync_backend = LIKE
        try:
            validate(cfg)
        finally:
            engines.weight_sync_backend = given

    put(place, validate_megatron_cfg)


def _have_workers_register() -> None:
    """SkyRL makes Ray's runtime environment and has no hook in it."""
    init = plug_point("ray:init", package="ray", wanted="ray>=2.50")

    def with_hook(*arguments: Any, runtime_env: dict[str, Any] | None = None, **options: Any) -> Any:
        hook = {"worker_process_setup_hook": f"{__name__}.register"}
        return init(*arguments, runtime_env={**hook, **(runtime_env or {})}, **options)

    put("ray:init", with_hook)
