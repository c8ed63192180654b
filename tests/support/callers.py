"""A server that does to each caller what a test says, byte by byte: answers that stall, drip or break off."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

LOOK_S = 0.05


@contextmanager
def serving(behave: Callable[[socket.socket, threading.Event], None]) -> Iterator[str]:
    """The URL of a server that calls ``behave`` with one caller after the other; its event is set when the context ends."""
    stop = threading.Event()

    def serve(listener: socket.socket) -> None:
        while not stop.is_set():
            try:
                caller, _ = listener.accept()
            except TimeoutError:
                continue
            with caller, suppress(OSError):
                behave(caller, stop)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(LOOK_S)
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            stop.set()
            thread.join(10)
