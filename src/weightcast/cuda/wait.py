"""Waiting for GPU work with a deadline, and typed constructors of torch's streams and events.

Streams come from torch's pool of 32 for each GPU: two users who meet on one wait for each other's work, which costs time and
nothing else, whereas a stream of one's own could not be destroyed while torch's allocator keeps blocks that were used on it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from weightcast.deadline import Deadline
from weightcast.errors import TransportError

SPIN_S = 0.03
"""How long a wait looks without sleeping: most rounds are over by then. Other threads may run at every look."""
STEP_S = 0.0002


def new_stream(device: torch.device, *, urgent: bool = False) -> torch.cuda.Stream:
    """``urgent``: its kernels get a multiprocessor before those of other streams that wait for one."""
    return torch.cuda.Stream(device, priority=-1 if urgent else 0)  # type: ignore[no-untyped-call]


def new_event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Make the device, and a stream of its own, current on this thread; nothing where the device is no GPU."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(new_stream(device)):
        yield


def wait_event(event: torch.cuda.Event, deadline: Deadline, what: str, check: Callable[[], None]) -> None:
    """Return when the event has happened. ``check`` is called while waiting and may raise to end the wait.

    Raises DeadlineExceeded, or TransportError when the work before the event failed.
    """
    start = time.monotonic()
    while not _happened(event, what):
        deadline.check(what)
        check()
        time.sleep(STEP_S if time.monotonic() - start > SPIN_S else 0)


def _happened(event: torch.cuda.Event, what: str) -> bool:
    try:
        return bool(event.query())  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise TransportError(f"{what} failed on the GPU: {error}") from error


def wait_queued(stream: torch.cuda.Stream, deadline: Deadline, what: str) -> None:
    """Return when all work queued on the stream is done; raises as ``wait_event`` does."""
    done = new_event()
    done.record(stream)
    wait_event(done, deadline, what, lambda: None)


def wait_stream(device: torch.device, deadline: Deadline, what: str) -> None:
    """``wait_queued`` of this thread's current stream of the device."""
    wait_queued(torch.cuda.current_stream(device), deadline, what)


class DeviceWait:
    """The wait for all work of a device. CUDA has no such wait with a limit, so a thread waits: one for all waits of this object, left
    behind where a deadline passes first. Not thread-safe."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._orders: queue.SimpleQueue[bool] | None = None

    def wait(self, deadline: Deadline, what: str, check: Callable[[], None] = lambda: None) -> None:
        """Return when all work queued on the device by this process is done, whatever its stream. ``check`` is called while waiting and
        may raise to end the wait.

        Raises DeadlineExceeded, or TransportError when the work failed.
        """
        if self._orders is None:
            self._orders, self._answers = queue.SimpleQueue(), queue.SimpleQueue[RuntimeError | None]()
            arguments = (self._device, self._orders, self._answers)
            self._thread = threading.Thread(
                target=_synchronize_again, args=arguments, name="weightcast-sync", daemon=True
            )
            self._thread.start()
        self._orders.put(True)
        while True:
            try:
                failure = self._answers.get(timeout=min(0.05, deadline.limit_s()))
                break
            except queue.Empty:
                try:
                    deadline.check(what)
                    check()
                except BaseException:
                    # The thread is left behind, with the answer that it still owes.
                    self._orders.put(False)
                    self._orders = None
                    raise
        if failure is not None:
            raise TransportError(f"{what} failed on the GPU: {failure}") from failure

    def close(self) -> None:
        """End the thread; idempotent."""
        if self._orders is not None:
            self._orders.put(False)
            self._orders = None
            self._thread.join()


def _synchronize_again(
    device: torch.device, orders: queue.SimpleQueue[bool], answers: queue.SimpleQueue[RuntimeError | None]
) -> None:
    while orders.get():
        failures: list[RuntimeError] = []
        _synchronize(device, failures)
        answers.put(failures[0] if failures else None)


def _synchronize(device: torch.device, failures: list[RuntimeError]) -> None:
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        failures.append(error)
