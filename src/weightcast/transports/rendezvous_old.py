"""How two processes meet to make a process group of their own: one TCP connection that plays the group's store.

The trainer listens on one address; the worker shows the secret of the trainer's offer, and only then do both exchange the
few keys that the group's constructor sets. Every wait here has a deadline and ends within a tenth of a second of an abort.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import secrets
import select
import socket
from collections.abc import Iterator
from datetime import timedelta

import msgspec
from torch._C._distributed_c10d import Store

from weightcast.deadline import Deadline
from weightcast.errors import InvalidInput, PeerLost, ProtocolError, TransportError, WeightcastError
from weightcast.known import known
from weightcast.secret import same_secret
from weightcast.transports.guard import EndGuard

_SECRET_NBYTES = 32
_MAX_FRAME_NBYTES = 2**20
_STEP_S = 0.1


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    key: str
    value: bytes


class PairStore(Store):
    """A torch.distributed Store for exactly two processes over one socket. Errors are kept in ``error``.

    The group's constructor turns an exception out of these methods into a RuntimeError; ``error`` has the real one.
    """

    def __init__(self, connection: socket.socket, deadline: Deadline, guard: EndGuard) -> None:
        super().__init__()
        self.connection = connection
        self._deadline = deadline
        self._guard = guard
        self._values: dict[str, bytes] = {}
        self.error: WeightcastError | None = None
        self.local_address: str = connection.getsockname()[0]

    def set(self, key: str, value: bytes | str) -> None:
        data = value.encode() if isinstance(value, str) else bytes(value)
        self._values[key] = data
        with self._remember():
            frame = msgspec.msgpack.encode(_Entry(key, data))
            _send(self.connection, len(frame).to_bytes(4, "big") + frame, self._deadline, self._guard)

    def get(self, key: str) -> bytes:
        with self._remember():
            while key not in self._values:
                entry = self._next_entry()
                self._values[entry.key] = entry.value
            return self._values[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait for all keys; the deadline of the connect call holds, ``timeout`` is not looked at."""
        for key in keys:
            self.get(key)

    def _next_entry(self) -> _Entry:
        nbytes = int.from_bytes(_receive(self.connection, 4, self._deadline, self._guard), "big")
        if nbytes > _MAX_FRAME_NBYTES:
            raise ProtocolError(f"a rendezvous frame of {nbytes} bytes")
        try:
            frame = _receive(self.connection, nbytes, self._deadline, self._guard)
            return msgspec.msgpack.decode(frame, type=known(_Entry))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ProtocolError(f"malformed rendezvous frame: {error}") from None

    @contextlib.contextmanager
    def _remember(self) -> Iterator[None]:
        try:
            yield
        except WeightcastError as error:
            self.error = error
            raise


class Listener:
    """The trainer's side: listens on ``address`` at a free port until closed."""

    def __init__(self, address: str, guard: EndGuard) -> None:
        self.secret = secrets.token_bytes(_SECRET_NBYTES)
        self._guard = guard
        try:
            family, _, _, _, target = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
            if ipaddress.ip_address(str(target[0]).partition("%")[0]).is_unspecified:
                raise InvalidInput(f"{address} is no address that a worker can connect to", field="address")
            self._socket = socket.create_server(target[:2], family=family)
        except OSError as error:
            raise TransportError(
                f"cannot listen on {address}: {error}", hint="Give an address of this machine that workers reach"
            ) from None
        self._socket.setblocking(False)
        self.port: int = self._socket.getsockname()[1]

    @contextlib.contextmanager
    def accept(self, deadline: Deadline) -> Iterator[PairStore]:
        """The store of the first caller who knows the secret; strangers are turned away. Closed on leaving."""
        while True:
            _ready(self._socket, select.POLLIN, deadline, self._guard, "waiting for the worker to connect")
            try:
                connection, _ = self._socket.accept()
            except OSError:
                # Whoever it was has gone again.
                continue
            with connection:
                if self._is_worker(connection, deadline):
                    yield PairStore(connection, deadline, self._guard)
                    return

    def close(self) -> None:
        self._socket.close()

    def _is_worker(self, connection: socket.socket, deadline: Deadline) -> bool:
        # A stranger who connects and says nothing must not keep the worker out until the deadline.
        limit = deadline.part(at_most_s=2.0)
        try:
            shown = _receive(connection, _SECRET_NBYTES, limit, self._guard)
        except (PeerLost, TimeoutError):
            return False
        return same_secret(shown, self.secret)


@contextlib.contextmanager
def dial(address: str, port: int, secret: bytes, deadline: Deadline, guard: EndGuard) -> Iterator[PairStore]:
    """The worker's side: connect, show the secret. A port where nobody listens is PeerLost at once."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    except (OSError, OverflowError) as error:
        raise TransportError(f"cannot resolve the trainer's address {address}:{port}: {error}") from None
    with socket.socket(family, kind, protocol) as connection:
        connection.setblocking(False)
        code = connection.connect_ex(target)
        if code == errno.EINPROGRESS:
            _ready(connection, select.POLLOUT, deadline, guard, f"connecting to {address}:{port}")
            code = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise PeerLost(f"no trainer at {address}:{port}: {os.strerror(code)}")
        _send(connection, secret, deadline, guard)
        yield PairStore(connection, deadline, guard)


def _ready(connection: socket.socket, event: int, deadline: Deadline, guard: EndGuard, what: str) -> None:
    poll = select.poll()
    poll.register(connection, event)
    while True:
        guard.check()
        deadline.check(what)
        if poll.poll(1000 * min(_STEP_S, deadline.remaining_s() + 0.001)):
            return


def _send(connection: socket.socket, data: bytes, deadline: Deadline, guard: EndGuard) -> None:
    connection.setblocking(False)
    view = memoryview(data)
    while view:
        _ready(connection, select.POLLOUT, deadline, guard, "meeting the other side")
        try:
            view = view[connection.send(view) :]
        except BlockingIOError:
            continue
        except OSError as error:
            raise PeerLost(f"the other side is gone while connecting: {error}") from None


def _receive(connection: socket.socket, nbytes: int, deadline: Deadline, guard: EndGuard) -> bytes:
    connection.setblocking(False)
    data = bytearray()
    while len(data) < nbytes:
        _ready(connection, select.POLLIN, deadline, guard, "meeting the other side")
        try:
            chunk = connection.recv(nbytes - len(data))
        except BlockingIOError:
            continue
        except OSError as error:
            raise PeerLost(f"the other side is gone while connecting: {error}") from None
        if not chunk:
            raise PeerLost("the other side is gone while connecting")
        data += chunk
    return bytes(data)
