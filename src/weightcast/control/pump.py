"""Pump: one thread that owns one ZeroMQ socket, sends what other threads queue and hands over what arrives."""

from __future__ import annotations

import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable

import zmq

from weightcast.messages import MAX_FRAME_NBYTES

logger = logging.getLogger(__name__)

TICK_S = 0.1


def prepare(socket: zmq.Socket[bytes]) -> None:
    """Options both sides share: bounded frames, no lingering, dead TCP peers noticed."""
    socket.setsockopt(zmq.LINGER, 200)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_NBYTES)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.IPV6, 0)


class Pump:
    """Runs ``on_frames(parts)`` for what arrives and ``on_tick()`` at least every 0.1 s, both on its own thread.

    ``send`` may be called from any thread and returns at once. ``close`` sends what is queued, ends the thread and closes
    the socket; it is idempotent.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        socket: zmq.Socket[bytes],
        on_frames: Callable[[list[bytes]], None],
        on_tick: Callable[[], None],
        name: str,
    ) -> None:
        self._socket = socket
        self._on_frames = on_frames
        self._on_tick = on_tick
        self._outgoing: queue.SimpleQueue[list[bytes] | None] = queue.SimpleQueue()
        address = f"inproc://wake-{secrets.token_hex(8)}"
        self._wake_reader: zmq.Socket[bytes] = context.socket(zmq.PAIR)
        self._wake_reader.bind(address)
        self._wake_writer: zmq.Socket[bytes] = context.socket(zmq.PAIR)
        self._wake_writer.connect(address)
        self._wake_lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def send(self, *parts: bytes) -> None:
        """Queue one message; after ``close`` it is dropped."""
        self._put(list(parts))

    def _put(self, item: list[bytes] | None) -> None:
        with self._wake_lock:
            if self._closed:
                return
            self._outgoing.put(item)
            if item is None:
                self._closed = True
            self._wake_writer.send(b"")

    def close(self, timeout_s: float = 2.0) -> None:
        """End the thread after what is queued was sent."""
        self._put(None)
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake_reader, zmq.POLLIN)
        next_tick = time.monotonic()
        try:
            while True:
                wait_s = max(0.0, next_tick - time.monotonic())
                ready = dict(poller.poll(int(wait_s * 1000) + 1))
                if self._wake_reader in ready and not self._flush():
                    return
                if self._socket in ready:
                    self._receive_all()
                if time.monotonic() >= next_tick:
                    next_tick = time.monotonic() + TICK_S
                    self._on_tick()
        finally:
            self._socket.close()
            self._wake_reader.close()
            with self._wake_lock:
                self._closed = True
                self._wake_writer.close()

    def _receive_all(self) -> None:
        for _ in range(64):
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._on_frames(parts)
            except Exception:  # a handler's fault must not silence the channel: it would look like a dead peer
                logger.exception("control channel: a handler failed")

    def _flush(self) -> bool:
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
            try:
                self._socket.send_multipart(item, zmq.NOBLOCK)
            except zmq.ZMQError as error:
                logger.info("control channel: a message was not sent: %s", error)
