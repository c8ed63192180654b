"""Pump: one thread that owns one ZeroMQ socket, sends what other threads queue and hands over what arrives."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable

import zmq
from zmq.utils.monitor import parse_monitor_message

from weightcast.control.pieces import MESSAGE_NBYTES
from weightcast.errors import TransportError

logger = logging.getLogger(__name__)

HEARTBEAT_S = 0.5
HANDSHAKE_MS = 20_000
"""A peer that has not shown a key by then is disconnected."""
LINGER_MS = 200
_DESCRIPTORS = 24
"""More than a context with its sockets takes."""


def set_options(socket: zmq.Socket[bytes], silence_s: float) -> None:
    """Options both sides share: bounded messages (see pieces) and handshakes, no lingering, and a connection that is closed when the peer
    is silent for ``silence_s``.

    ZeroMQ's own I/O threads send, answer and judge heartbeats, so no decode, no handler and nothing that holds Python's lock delays
    them; a process that is stopped answers none. A heartbeat stands behind what was sent before, and what a stopped process does not
    read stays unsent: the kernel gives up a connection whose peer takes no byte for as long.
    """
    heartbeat_s = heartbeat_every(silence_s)
    socket.setsockopt(zmq.HEARTBEAT_IVL, _ms(heartbeat_s))
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _ms(silence_s - heartbeat_s))
    socket.setsockopt(zmq.TCP_MAXRT, _ms(silence_s))
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.MAXMSGSIZE, MESSAGE_NBYTES)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.IPV6, 0)


def heartbeat_every(silence_s: float) -> float:
    """Seconds from one heartbeat to the next, so that several of them are missed before a peer is taken for silent."""
    return min(HEARTBEAT_S, silence_s / 4)


def _ms(seconds: float) -> int:
    return max(1, min(2**31 - 1, int(seconds * 1000)))


def new_context() -> zmq.Context[zmq.Socket[bytes]]:
    """A ZeroMQ context. TransportError where this process may open fewer descriptors than a context with its sockets takes: libzmq
    would end the process."""
    spare: list[int] = []
    try:
        while len(spare) < _DESCRIPTORS:
            spare.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        raise TransportError(
            f"this process may open no more files and sockets: {error}",
            hint="Raise the limit (ulimit -n), or close what is open, then call again",
        ) from error
    finally:
        for descriptor in spare:
            os.close(descriptor)
    return zmq.Context()


class Pump:
    """Runs ``on_frames(parts)`` for what arrives and ``on_tick()`` every ``tick_s``, both on its own thread.

    ``on_unsent(parts)`` is called for a message whose receiver is gone, ``on_event(event, descriptor)`` for each of ``events`` that
    ZeroMQ tells of a connection. ``send`` may be called from any thread and returns at once. The pump owns the context and the
    socket: both are freed when its thread ends.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        socket: zmq.Socket[bytes],
        on_frames: Callable[[list[zmq.Frame]], None],
        on_tick: Callable[[], None],
        name: str,
        *,
        tick_s: float,
        on_unsent: Callable[[list[bytes]], None] | None = None,
        on_event: Callable[[int, int], None] | None = None,
        events: int = zmq.EVENT_DISCONNECTED,
    ) -> None:
        self._context = context
        self._socket = socket
        self._on_frames = on_frames
        self._on_tick = on_tick
        self._tick_s = tick_s
        self._on_unsent = on_unsent
        self._on_event = on_event
        self._outgoing: queue.SimpleQueue[list[bytes] | threading.Event | None] = queue.SimpleQueue()
        address = f"inproc://wake-{secrets.token_hex(8)}"
        self._wake_reader: zmq.Socket[bytes] = context.socket(zmq.PAIR)
        self._wake_reader.bind(address)
        self._wake_writer: zmq.Socket[bytes] = context.socket(zmq.PAIR)
        self._wake_writer.connect(address)
        self._wake_lock = (
            threading.RLock()
        )  # the garbage collector may close a dropped publisher while this thread has it
        self._closed = False
        self._monitor: zmq.Socket[bytes] | None = None
        if on_event is not None:
            self._monitor = socket.get_monitor_socket(events)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Have the thread run. Where a signal's handler raises meanwhile, the thread may run all the same, and ends."""
        try:
            self._thread.start()
        except BaseException:
            self.stop()
            raise

    def send(self, *parts: bytes) -> None:
        """Queue one message; after ``stop`` it is dropped."""
        self._put(list(parts))

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything queued before was handed to the socket, and what had arrived by then was handed over; False when that took
        longer, or the pump ended."""
        passed = threading.Event()
        self._put(passed)
        return passed.wait(timeout_s)

    def stop(self) -> None:
        """End the thread soon, after what is queued was sent; from any thread, its own too. Idempotent."""
        self._put(None)

    def close(self, timeout_s: float = 2.0) -> None:
        """``stop``, and wait for the end."""
        self.stop()
        if self._thread.is_alive() and not self.is_this_thread:
            self._thread.join(timeout_s)

    @property
    def is_this_thread(self) -> bool:
        """Whether the caller is a handler of this pump."""
        return threading.current_thread() is self._thread

    def _put(self, item: list[bytes] | threading.Event | None) -> None:
        with self._wake_lock:
            if self._closed:
                return
            self._outgoing.put(item)
            if item is None:
                self._closed = True
            # A full pipe means that the thread has been woken already.
            with contextlib.suppress(zmq.Again):
                self._wake_writer.send(b"", zmq.NOBLOCK)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake_reader, zmq.POLLIN)
        if self._monitor is not None:
            poller.register(self._monitor, zmq.POLLIN)
        last_tick = time.monotonic()
        try:
            while True:
                wait_s = max(0.0, last_tick + self._tick_s - time.monotonic())
                ready = dict(poller.poll(int(wait_s * 1000) + 1))
                flushed: list[threading.Event] = []
                if self._wake_reader in ready and not self._flush(flushed):
                    return
                if self._socket in ready or flushed:
                    self.receive_all()
                if self._monitor is not None and self._monitor in ready:
                    self.hear_events()
                for passed in flushed:
                    passed.set()
                now = time.monotonic()
                if now >= last_tick + self._tick_s:
                    last_tick = now
                    self._guarded(self._on_tick)
        finally:
            self._free()

    def _free(self) -> None:
        if self._monitor is not None:
            self._socket.disable_monitor()
            self._monitor.close()
        self._socket.close()
        self._wake_reader.close()
        with self._wake_lock:
            self._closed = True
            self._wake_writer.close()
        self._context.term()

    def receive_all(self) -> bool:
        """Hand over what has arrived; False when there is more of it. On the I/O thread."""
        for _ in range(64):
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return True
            self._guarded(lambda parts=parts: self._on_frames(parts))  # type: ignore[misc]
        return False

    def hear_events(self) -> None:
        """Hand over the events of connections so far; on the I/O thread, for a handler that has to know them."""
        assert self._monitor is not None
        assert self._on_event is not None
        with contextlib.suppress(zmq.Again):
            while True:
                told = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))
                self._guarded(lambda told=told: self._on_event(told["event"], told["value"]))  # type: ignore[misc]

    @staticmethod
    def _guarded(handle: Callable[[], None]) -> None:
        try:
            handle()
        except Exception:  # a handler's fault must not silence the channel: it would look like a dead peer
            logger.exception("control channel: a handler failed")

    def _flush(self, flushed: list[threading.Event]) -> bool:
        """Send what is queued; False where the end is queued. ``flushed`` gets the events of those that wait for this."""
        while True:
            try:
                self._wake_reader.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
        while True:
            try:
                item = self._outgoing.get_nowait()
            except queue.Empty:
                return True
            if item is None:
                return False
            if isinstance(item, threading.Event):
                flushed.append(item)
                continue
            try:
                self._socket.send_multipart(item, zmq.NOBLOCK)
            except zmq.ZMQError as error:
                logger.info("control channel: a message was not sent: %s", error)
                if self._on_unsent is not None:
                    self._guarded(lambda item=item: self._on_unsent(item))  # type: ignore[misc]
