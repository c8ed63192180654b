"""How the two processes of a pair meet: the trainer listens, the worker dials, and each proves that it knows the pair's secret.

The secret reached the worker over the encrypted control channel. Neither side shows it: both answer the other's fresh nonce
with an HMAC of it, as the three-pass mutual authentication of ISO/IEC 9798-4 does.

    worker  → trainer   magic, lane, nonce w
    trainer → worker    nonce t, HMAC(secret, "trainer" · lane · w · t)
    worker  → trainer   HMAC(secret, "worker" · lane · w · t)
    trainer → worker    one byte: you are in

All callers are read side by side, so that strangers who connect and say nothing keep nobody waiting. A caller that is wrong, or
takes longer than ``CALLER_S``, is turned away without a word. Every wait has a deadline and ends within a tenth of a second of an
abort.
"""

from __future__ import annotations

import errno
import hmac
import ipaddress
import os
import secrets
import select
import socket

from weightcast.deadline import Deadline
from weightcast.errors import InvalidInput, PeerLost, TransportError
from weightcast.transports.connection import STEP_S, Connection
from weightcast.transports.guard import EndGuard
from weightcast.untrusted.secret import same_secret

SECRET_NBYTES = 32
CALLER_S = 2.0
"""How long a caller may take to prove that it is the worker."""
MOST_CALLERS = 128
"""Callers that are listened to at a time; a new one takes the place of the one that has been there longest."""
_MAGIC = b"wc-pair3"
_NONCE_NBYTES = 32
_HELLO_NBYTES = len(_MAGIC) + 1 + _NONCE_NBYTES
_PROOF_NBYTES = 32
_WELCOME = b"\x01"
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Listener:
    """The trainer's side. Listens at a free port of ``address`` until it is closed."""

    def __init__(self, address: str, guard: EndGuard, secret: bytes = b"") -> None:
        """``secret`` is made where none is given."""
        self.secret = secret or secrets.token_bytes(SECRET_NBYTES)
        self._guard = guard
        try:
            family, _, _, _, target = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
            if ipaddress.ip_address(str(target[0]).partition("%")[0]).is_unspecified:
                raise InvalidInput(f"{address} is no address that a worker can connect to", field="address")
            self._socket = socket.create_server(target[:2], family=family, backlog=MOST_CALLERS)
        except OSError as error:
            raise TransportError(
                f"cannot listen on {address}: {error}", hint="Give an address of this machine that workers reach"
            ) from None
        self._socket.setblocking(False)
        self._rests: Deadline | None = None
        """Until then nobody is taken in: there was no descriptor, or no memory, for a caller that still waits."""
        self.port: int = self._socket.getsockname()[1]

    def accept(self, deadline: Deadline, lanes: int = 1) -> list[Connection]:
        """Return the worker's connections, one for each lane."""
        callers: dict[int, Caller] = {}
        found: dict[int, socket.socket] = {}
        try:
            while len(found) < lanes:
                self._guard.check()
                deadline.check("waiting for the worker to connect")
                self._listen(callers, min(STEP_S, deadline.remaining_s() + 0.001))
                for number, caller in list(callers.items()):
                    if caller.is_in and caller.lane < lanes and caller.lane not in found:
                        found[caller.lane] = callers.pop(number).socket
                    elif caller.is_over:
                        callers.pop(number).socket.close()
        except BaseException:
            for accepted in found.values():
                accepted.close()
            raise
        finally:
            for caller in callers.values():
                caller.socket.close()
        return [Connection(found[lane], self._guard) for lane in range(lanes)]

    def close(self) -> None:
        self._socket.close()

    def _listen(self, callers: dict[int, Caller], timeout_s: float) -> None:
        """Wait for new callers and for more words of those who are there."""
        poll = select.poll()
        if self._rests is None or self._rests.passed:
            poll.register(self._socket, select.POLLIN)
        for caller in callers.values():
            poll.register(caller.socket, select.POLLIN)
        for number, _ in poll.poll(1000 * timeout_s):
            if number in callers:
                callers[number].listen()
                continue
            try:
                connection, _ = self._socket.accept()
            except OSError as error:
                if error.errno in _NO_ROOM:
                    self._rests = Deadline(STEP_S)
                continue  # the caller may have gone again
            if len(callers) >= MOST_CALLERS:
                callers.pop(next(iter(callers))).socket.close()
            callers[connection.fileno()] = Caller(connection, self.secret)


class Caller:
    """Somebody who connected and has not proved yet to be the worker."""

    def __init__(self, connection: socket.socket, secret: bytes) -> None:
        connection.setblocking(False)
        self.socket = connection
        self.is_in = False
        self.lane = -1
        self._secret = secret
        self._heard = bytearray()
        self._nonce = secrets.token_bytes(_NONCE_NBYTES)
        self._limit = Deadline(CALLER_S)
        self._is_wrong = False

    @property
    def is_over(self) -> bool:
        return self.is_in or self._is_wrong or self._limit.passed

    def listen(self) -> None:
        """Take what has come. Never raises and never waits."""
        wanted = _HELLO_NBYTES if self.lane < 0 else _HELLO_NBYTES + _PROOF_NBYTES
        try:
            heard = self.socket.recv(wanted - len(self._heard))
            self._heard += heard
            if not heard:
                self._is_wrong = True
            elif len(self._heard) == _HELLO_NBYTES:
                self._answer()
            elif len(self._heard) == _HELLO_NBYTES + _PROOF_NBYTES:
                self._judge()
        except BlockingIOError:
            return
        except OSError:
            self._is_wrong = True

    def _answer(self) -> None:
        self._is_wrong = self._heard[: len(_MAGIC)] != _MAGIC
        if not self._is_wrong:
            self.lane = self._heard[len(_MAGIC)]
            self.socket.send(self._nonce + self._proof(b"trainer"))

    def _judge(self) -> None:
        self.is_in = same_secret(bytes(self._heard[_HELLO_NBYTES:]), self._proof(b"worker"))
        self._is_wrong = not self.is_in
        if self.is_in:
            self.socket.send(_WELCOME)

    def _proof(self, side: bytes) -> bytes:
        theirs = bytes(self._heard[_HELLO_NBYTES - _NONCE_NBYTES : _HELLO_NBYTES])
        return proof(self._secret, side, self.lane, theirs, self._nonce)


def dial(address: str, port: int, secret: bytes, deadline: Deadline, guard: EndGuard, *, lane: int = 0) -> Connection:
    """The worker's side: connect, and prove to each other who the two are. A port where nobody listens is PeerLost at once. A listener
    that does not know the secret is TransportError."""
    what = f"connecting to {address}:{port}"
    connection = Connection(_open(address, port), guard)
    try:
        connection.wait(select.POLLOUT, deadline, what)
        code = connection.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise PeerLost(f"nobody listens at {address}:{port}: {os.strerror(code)}")
        mine = secrets.token_bytes(_NONCE_NBYTES)
        connection.send([_MAGIC + bytes([lane]) + mine], deadline, what)
        answer = connection.receive_bytes(_NONCE_NBYTES + _PROOF_NBYTES, deadline, what)
        theirs = answer[:_NONCE_NBYTES]
        if not same_secret(answer[_NONCE_NBYTES:], proof(secret, b"trainer", lane, mine, theirs)):
            raise TransportError(f"who listens at {address}:{port} does not know the pair's secret")
        connection.send([proof(secret, b"worker", lane, mine, theirs)], deadline, what)
        connection.receive_bytes(len(_WELCOME), deadline, what)
    except BaseException:
        connection.close()
        raise
    return connection


def _open(address: str, port: int) -> socket.socket:
    """A socket that has begun to connect."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, kind, protocol)
    except (OSError, OverflowError, UnicodeError) as error:  # UnicodeError: a name that no resolver could be asked for
        raise TransportError(f"cannot resolve the trainer's address {address}:{port}: {error}") from None
    opened.setblocking(False)
    code = opened.connect_ex(target)
    if code not in (0, errno.EINPROGRESS):
        opened.close()
        raise PeerLost(f"nobody listens at {address}:{port}: {os.strerror(code)}")
    return opened


def proof(secret: bytes, side: bytes, lane: int, worker_nonce: bytes, trainer_nonce: bytes) -> bytes:
    """Return what only a side that knows the secret can answer to these two nonces."""
    return hmac.digest(secret, side + bytes([lane]) + worker_nonce + trainer_nonce, "sha256")
