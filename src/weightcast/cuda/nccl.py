"""NCCL without hangs: a non-blocking communicator whose every wait has a deadline and ends in ``abort`` when it fails.

Load-bearing: NCCL's kernels of a call to a dead peer never end by themselves; aborting the communicator ends them and leaves
CUDA usable. A non-blocking communicator launches in the background, so nothing else may be put on its stream before its state is
Success again. After a failure a communicator is only good for ``abort``.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from weightcast.cuda.wait import new_event, new_stream, wait_event
from weightcast.deadline import Deadline
from weightcast.errors import PeerLost, TransportError, Unsupported

logger = logging.getLogger(__name__)

UNIQUE_ID_NBYTES = 128
ABORT_S = 5.0
"""How long freeing a communicator is waited for."""
PROMPT_ABORT_S = 0.3
"""The same while an error is on its way to the caller."""
SPIN_S = 0.002
STEP_S = 0.0001
_SUCCESS, _REMOTE_ERROR, _IN_PROGRESS = 0, 6, 7


def load_nccl() -> Any:
    """The module nccl.core; Unsupported says what is missing."""
    if not torch.cuda.is_available():
        raise Unsupported("NCCL needs a CUDA GPU")
    try:
        import nccl.core
    except (ImportError, RuntimeError) as error:
        raise Unsupported(f"nccl4py cannot be loaded: {error}", hint="pip install 'weightcast[nccl]'") from error
    return nccl.core


def new_unique_id() -> bytes:
    """128 bytes that all ranks of one communicator have to know. NCCL listens for the ranks from now on."""
    return bytes(load_nccl().get_unique_id())


class Communicator:
    """``world_size`` ranks of one NCCL communicator on one GPU each. Not thread-safe but for ``abort``.

    ``check`` is called during every wait and may raise to end it. Whatever a method raises, the communicator is
    aborted then: the other ranks learn it by their own deadline, or sooner by whoever tells them.
    """

    def __init__(self, device: torch.device, check: Callable[[], None] = lambda: None) -> None:
        self.device = device
        # Beside kernels that fill the GPU, such as packing, a broadcast would start only when they are through.
        self.stream = new_stream(device, urgent=True)
        self._nccl = load_nccl()
        self._check = check
        self._comm: Any = None
        self._lock = threading.Lock()
        self._aborter: threading.Thread | None = None

    def connect(self, unique_id: bytes, rank: int, world_size: int, deadline: Deadline) -> None:
        """Meet all ranks; every rank calls it with the same id."""
        if len(unique_id) != UNIQUE_ID_NBYTES:
            raise TransportError(f"an NCCL id has {UNIQUE_ID_NBYTES} bytes, not {len(unique_id)}")
        what = f"connecting NCCL rank {rank} of {world_size}"
        with torch.cuda.device(self.device), self._aborting(what):
            config = self._nccl.NCCLConfig(blocking=False)
            identity = self._nccl.UniqueId.from_bytes(unique_id)
            self._comm = self._nccl.Communicator.init(world_size, rank, identity, config)
            self._settle(deadline, what)

    def watch(self, check: Callable[[], None]) -> None:
        """Call ``check`` during every wait from now on, in place of the former one."""
        self._check = check

    def broadcast(self, buffer: torch.Tensor, root: int, deadline: Deadline) -> None:
        """Queue the broadcast of a buffer from ``root`` to all, in place, on the stream."""
        self._launch(
            "an NCCL broadcast", deadline, lambda c, s: c.broadcast(buffer, buffer, root, stream=s.cuda_stream)
        )

    def all_reduce(self, buffer: torch.Tensor, deadline: Deadline) -> None:
        """Queue the sum over all ranks, in place, on the stream."""
        op = self._nccl.SUM
        self._launch("an NCCL all-reduce", deadline, lambda c, s: c.allreduce(buffer, buffer, op, stream=s.cuda_stream))

    def wait(self, event: torch.cuda.Event, deadline: Deadline, what: str) -> None:
        """Return when the event has happened on the GPU; NCCL's errors and ``check`` end the wait."""
        with self._aborting(what):
            wait_event(event, deadline, what, lambda: self._refuse_failure(what))

    def finish(self, deadline: Deadline, what: str) -> None:
        """Return when all that was queued on the stream is done."""
        done = new_event()
        done.record(self.stream)
        self.wait(done, deadline, what)

    def abort(self, wait_s: float = ABORT_S) -> None:
        """End all work of the communicator and free it; any thread, idempotent, never raises.

        NCCL takes its time for that: after ``wait_s`` it goes on in the background.
        """
        with self._lock:
            comm, self._comm = self._comm, None
            if comm is not None:
                self._aborter = threading.Thread(
                    target=_abort, args=(comm, self.device), name="weightcast-nccl-abort", daemon=True
                )
                self._aborter.start()
            aborter = self._aborter
        if aborter is not None:
            aborter.join(wait_s)

    def _launch(self, what: str, deadline: Deadline, call: Callable[[Any, torch.cuda.Stream], None]) -> None:
        with torch.cuda.device(self.device), self._aborting(what):
            call(self._alive(what), self.stream)
            self._settle(deadline, what)

    def _alive(self, what: str) -> Any:
        comm = self._comm
        if comm is None:
            raise TransportError(f"{what}: the communicator is gone", hint="Connect again")
        return comm

    def _settle(self, deadline: Deadline, what: str) -> None:
        """Wait until what was launched in the background is on its stream."""
        start = time.monotonic()
        while self._in_progress(what):
            deadline.check(what)
            if time.monotonic() - start > SPIN_S:
                time.sleep(STEP_S)

    def _refuse_failure(self, what: str) -> None:
        self._in_progress(what)

    def _in_progress(self, what: str) -> bool:
        """Whether a launch is still in the background; PeerLost or TransportError when the communicator failed."""
        self._check()
        result = int(self._alive(what).get_async_error())
        if result == _REMOTE_ERROR:
            raise PeerLost(f"{what}: NCCL says that another process is gone")
        if result not in (_SUCCESS, _IN_PROGRESS):
            text = self._nccl.get_error_string(result)
            raise TransportError(f"{what}: NCCL: {text}", hint="NCCL_DEBUG=WARN in both processes says more")
        return result == _IN_PROGRESS

    def _aborting(self, what: str) -> _AbortOnError:
        return _AbortOnError(self, what)


class _AbortOnError:
    """Aborts the communicator when the block raises; NCCL's own exceptions become TransportError."""

    def __init__(self, communicator: Communicator, what: str) -> None:
        self._communicator = communicator
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: object) -> None:
        if error is None:
            return
        self._communicator.abort(PROMPT_ABORT_S)
        if type(error).__name__ in ("NCCLError", "NcclInvalid"):
            raise TransportError(f"{self._what}: {error}") from error


def _abort(comm: Any, device: torch.device) -> None:
    """Catches everything: what an already failed library raises while it is torn down helps nobody."""
    try:
        with torch.cuda.device(device):
            comm.abort()
    except Exception as error:  # noqa: BLE001
        logger.warning("aborting an NCCL communicator: %s", error)
