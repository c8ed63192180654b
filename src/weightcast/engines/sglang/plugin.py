"""The plug-in: SGLang calls ``register`` in its main process, in each scheduler, in the detokenizer and in a data-parallel controller.

Everything is done by SGLang's hooks. A hook imports its target, so a process gets hooks of what it has imported already; the main one, which
loads plug-ins before anything else, also those of what it will import.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
from typing import Any

from weightcast.errors import Unsupported

SCHEDULER = "sglang.srt.managers.scheduler"
SERVING = "sglang.srt.managers.tokenizer_control_mixin"
UPDATER = "sglang.srt.managers.scheduler_components.weight_updater"
AUTH = "sglang.srt.utils.auth"
HTTP_SERVER = "sglang.srt.entrypoints.http_server"

OTHERS_UPDATES = (
    "update_weights_from_disk",
    "update_weights_from_distributed",
    "update_weights_from_tensor",
    "update_weights_from_ipc",
)

logger = logging.getLogger(__name__)


def register() -> None:
    """Let weightcast in. SGLang calls this wherever weightcast is installed, so a version out of range only logs what it is."""
    from sglang.version import __version__

    from weightcast.engines.sglang.versions import SUPPORTED

    log_as_sglang()
    try:
        SUPPORTED.check(__version__)
    except Unsupported as error:
        logger.warning("%s: no weights can be published to this engine. %s", error.message, error.hint)
        return
    from sglang.srt.managers.io_struct import hook_custom_types
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from weightcast.engines.sglang.messages import WeightcastAnswer, WeightcastOrder

    hook_custom_types(WeightcastOrder, WeightcastAnswer)
    if SCHEDULER in sys.modules:
        HookRegistry.register(f"{SCHEDULER}.Scheduler.init_ipc_channels", _where_to_answer, HookType.AFTER)
        HookRegistry.register(f"{SCHEDULER}.Scheduler.init_request_dispatcher", _in_scheduler, HookType.AFTER)
        HookRegistry.register(f"{SCHEDULER}.Scheduler.get_next_batch_to_run", _none_while_paused, HookType.AROUND)
        HookRegistry.register(f"{SCHEDULER}.Scheduler.continue_generation", _not_while_held, HookType.AROUND)
        manager = f"{UPDATER}.SchedulerWeightUpdaterManager"
        HookRegistry.register(f"{manager}.release_memory_occupation", _before_sleep, HookType.BEFORE)
        HookRegistry.register(f"{manager}.resume_memory_occupation", _undisturbed, HookType.AROUND)
        for name in OTHERS_UPDATES:
            HookRegistry.register(f"{manager}.{name}", _updated_by_others, HookType.AFTER)
    if SERVING in sys.modules or multiprocessing.parent_process() is None:
        HookRegistry.register(f"{SERVING}.TokenizerControlMixin.init_communicators", _where_served, HookType.AFTER)
        HookRegistry.register(f"{AUTH}.decide_request_auth", _own_paths, HookType.AROUND)


def log_as_sglang() -> None:
    """Have weightcast's lines appear in SGLang's log, which is that of the root logger; an application's own level is left alone."""
    own = logging.getLogger("weightcast")
    if own.level == logging.NOTSET and not os.environ.get("WEIGHTCAST_LOG_LEVEL"):
        own.setLevel(logging.INFO)


# -- in a scheduler


def _in_scheduler(result: Any, scheduler: Any, *_: Any, **__: Any) -> None:
    from sglang.utils import TypeBasedDispatcher

    from weightcast.engines.sglang.messages import WeightcastOrder
    from weightcast.engines.sglang.worker import SchedulerCalls

    calls = scheduler.weightcast = SchedulerCalls(scheduler)
    handle = _answering(scheduler) if calls.answers_itself else calls.handle
    scheduler._request_dispatcher += TypeBasedDispatcher([(WeightcastOrder, handle)])


def _where_to_answer(result: Any, scheduler: Any, port_args: Any, *_: Any, **__: Any) -> None:
    scheduler.weightcast_answers_to = port_args.tokenizer_ipc_name


def _answering(scheduler: Any) -> Any:
    """A handler that sends its answer itself: SGLang has a way to the process that serves requests in a pipeline's first stage alone."""
    import zmq
    from sglang.srt.utils.network import get_zmq_socket

    socket = get_zmq_socket(zmq.Context(1), zmq.PUSH, scheduler.weightcast_answers_to, False)
    sender = type(scheduler.ipc_channels.send_to_tokenizer)(socket)
    return lambda order: sender.send_output(scheduler.weightcast.handle(order), order)


def _none_while_paused(next_batch: Any, scheduler: Any, running_batch: Any, last_batch: Any) -> Any:
    """SGLang's loop for pipelines does not ask whether the scheduler is paused."""
    calls = getattr(scheduler, "weightcast", None)
    if calls is None or not calls.stands:
        return next_batch(scheduler, running_batch=running_batch, last_batch=last_batch)
    from sglang.srt.managers.schedule_batch import NextBatchPlan

    return NextBatchPlan(batch_to_run=None, running_batch=running_batch)


def _not_while_held(go_on: Any, scheduler: Any, *arguments: Any, **named: Any) -> Any:
    """SGLang's own /continue_generation does not end a hold: only new weights do."""
    calls = getattr(scheduler, "weightcast", None)
    if calls is not None and calls.held:
        logger.error(
            "generation stays paused: the weights are of no version, and the next update that succeeds goes on"
        )
        return None
    return go_on(scheduler, *arguments, **named)


def _before_sleep(manager: Any, request: Any) -> None:
    if calls := _calls_of(manager):
        calls.before_sleep(request.tags)


def _undisturbed(resume: Any, manager: Any, request: Any) -> Any:
    calls = _calls_of(manager)
    if calls is None:
        return resume(manager, request)
    with calls.worker.undisturbed():
        return resume(manager, request)


def _updated_by_others(result: Any, manager: Any, request: Any) -> None:
    if calls := _calls_of(manager):
        calls.updated_by_others(getattr(request, "weight_version", None))


def _calls_of(manager: Any) -> Any:
    return getattr(getattr(manager, "scheduler", None), "weightcast", None)


# -- in the process that serves requests


def _where_served(result: Any, tokenizer_manager: Any, *_: Any, **__: Any) -> None:
    from weightcast.engines.sglang.served import SglangEngine

    tokenizer_manager.weightcast = SglangEngine(tokenizer_manager)
    server = sys.modules.get(HTTP_SERVER)
    if server is not None:
        from weightcast.engines.sglang.routes import serve_routes

        serve_routes(server.app, tokenizer_manager.weightcast)


def _own_paths(decide: Any, *, path: str, **named: Any) -> Any:
    """SGLang's API key guards SGLang's routes; weightcast's are guarded by weightcast's token."""
    from weightcast.engines.sglang.routes import is_own_path

    decision = decide(path=path, **named)
    return type(decision)(allowed=True) if is_own_path(path) else decision
