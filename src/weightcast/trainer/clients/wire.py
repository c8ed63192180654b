"""One HTTP call with one deadline for all of it, from the first look at the host's name.

HTTP libraries limit each wait by itself, so a server that accepts, stalls and drips bytes holds its caller for any time. Here
every wait is cut into short ones and ends when the call's deadline does, also when another thread cancels that deadline.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import queue
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpcore
import msgspec

from weightcast.deadline import Deadline
from weightcast.errors import AnswerLost, DeadlineExceeded, PeerLost, WeightcastError
from weightcast.quoted import quoted
from weightcast.trainer.clients.urls import Endpoint

T = TypeVar("T")
STEP_S = 0.2
TRY_S = 0.02
ASK_S = 5.0
"""How long a server that is waited for may take to answer, before it is asked again."""
AGAIN_S = 0.3
GATEWAY_STATUSES = (502, 503, 504)
ANSWER_NBYTES = 64 * 2**20
"""What is read of an answer; digests of 100,000 tensors take a tenth of it."""
Address = tuple[Any, ...]
Found = tuple[socket.AddressFamily, Address]
"""An address of a host."""


def request(method: str, endpoint: Endpoint, path: str, content: bytes | None, deadline: Deadline) -> httpcore.Response:
    """One request, of JSON if of anything, over a connection of its own. Raises what httpcore does: TimeoutException, NetworkError,
    ProtocolError, which an answer of more than ANSWER_NBYTES is, too."""
    headers = [("Content-Type", "application/json"), *endpoint.headers.items()]
    with (
        httpcore.ConnectionPool(
            network_backend=_Backend(deadline), max_keepalive_connections=0, uds=endpoint.socket_path
        ) as pool,
        pool.stream(method, endpoint.base + path, headers=headers, content=content) as response,
    ):
        body = bytearray()
        for chunk in response.iter_stream():
            body += chunk
            if len(body) > ANSWER_NBYTES:
                raise too_long()
    return read_response(response.status, response.headers, bytes(body))


def read_response(status: int, headers: Sequence[tuple[bytes, bytes]], content: bytes) -> httpcore.Response:
    """A response that has come as a whole."""
    response = httpcore.Response(status, headers=headers, content=content)
    response.read()
    return response


def too_long() -> httpcore.RemoteProtocolError:
    """What is said of an answer that is not read to its end."""
    return httpcore.RemoteProtocolError(f"the answer has more than {ANSWER_NBYTES} bytes")


def wait_until_there(endpoint: Endpoint, path: str, deadline: Deadline) -> None:
    """Return once the server itself answers, whatever it answers, or never will; DeadlineExceeded says what came instead until then. A server that
    loads its model does not listen yet, or a proxy answers in its place."""
    said = ""
    while True:
        try:
            status = request("GET", endpoint, path, None, deadline.part(at_most_s=ASK_S)).status
            if status not in GATEWAY_STATUSES:
                return
            said = f"a proxy answers {status}"
        except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError) as error:
            if isinstance(error, Unreachable) and error.is_lasting:
                return  # the next call says so
            if not (said and deadline.passed):  # else it says no more than that the time was up
                said = quoted(str(error)) or type(error).__name__
        if deadline.passed:
            if deadline.cancelled:
                deadline.check(f"waiting for {endpoint.url}")
            raise DeadlineExceeded(
                f"no server was there within {deadline.timeout_s:g} s: {said}",
                hint="See the server's log; if it is still loading, wait longer",
            )
        time.sleep(min(AGAIN_S, deadline.remaining_s()))


def json_object(content: bytes) -> dict[str, Any]:
    """An answer's JSON object; an empty one for anything else, nested beyond what can be read included."""
    try:
        value = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


class Unreachable(httpcore.ConnectError):
    """No server is reached, for a reason that is known; ``hint`` says what to do about that."""

    def __init__(self, message: str, hint: str, *, is_lasting: bool = False) -> None:
        super().__init__(message)
        self.hint = hint
        self.is_lasting = is_lasting
        """Nothing that may come up later changes that."""


NO_HTTP_HINT = "No HTTP is spoken there: is it https:// instead of http://, or another port?"
FAILURES = (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError)
"""What a call ends with that brought no answer."""


def failure(error: Exception, call: str, engine: str, deadline: Deadline) -> WeightcastError:
    """What one of ``FAILURES`` is to a user: DeadlineExceeded, PeerLost where no connection was made, or AnswerLost. ``call``: its
    method and path."""
    if isinstance(error, httpcore.TimeoutException):
        return deadline.exceeded(call, engine=engine)
    said = f"{call}: {quoted(str(error)) or type(error).__name__}"
    if isinstance(error, httpcore.ConnectError):
        hint = error.hint if isinstance(error, Unreachable) else "Is the server running?"
        return PeerLost(said, reached=False, engine=engine, hint=hint)
    no_http = isinstance(error, httpcore.RemoteProtocolError) and "illegal" in str(error)
    return AnswerLost(said, engine=engine, hint=NO_HTTP_HINT if no_http else None)


class _Backend(httpcore.NetworkBackend):
    """Connects, and puts the deadline around the stream."""

    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        error: httpcore.ConnectError | None = None
        for family, address in _resolved(host, port, self._deadline):
            try:
                return _Stream(_connected(family, address, self._deadline), self._deadline)
            except httpcore.ConnectError as refused:
                error = refused
        raise error or no_address(host)

    def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore.NetworkStream:
        return _Stream(_connected_unix(path, self._deadline), self._deadline)


def look_up(host: str, port: int) -> list[Found] | httpcore.ConnectError:
    """The addresses of a host, or why there are none. A resolver that hangs cannot be interrupted."""
    flags = socket.AI_NUMERICHOST if is_literal(host) else 0
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that no resolver could be asked for
        return Unreachable(f"{host}: {error}", "Check the name of the host")
    return [(family, address) for family, _, _, _, address in found]


def _resolved(host: str, port: int, deadline: Deadline) -> list[Found]:
    """The addresses of a host. A resolver that hangs is left behind on a thread of its own."""
    answers: queue.SimpleQueue[list[Found] | httpcore.ConnectError] = queue.SimpleQueue()
    if is_literal(host):
        answers.put(look_up(host, port))
    else:
        threading.Thread(
            target=lambda: answers.put(look_up(host, port)), name="weightcast-resolve", daemon=True
        ).start()
    while True:
        try:
            found = answers.get(timeout=_step_s(deadline, httpcore.ConnectTimeout))
        except queue.Empty:
            continue
        if isinstance(found, httpcore.ConnectError):
            raise found
        return found


def no_address(host: str) -> Unreachable:
    """What to say of a host that is known and has no address."""
    return Unreachable(f"{host} has no address", "Check the name of the host")


def is_literal(host: str) -> bool:
    """Whether the host is an address, so that nobody has to be asked for one."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def connecting(family: socket.AddressFamily, address: Address) -> socket.socket:
    """A socket that begins to connect: it can be written once it is connected, or has failed. Raises ConnectError."""
    try:
        connection = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise httpcore.ConnectError(str(error)) from error
    try:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        code = connection.connect_ex(address)
        if code not in (0, errno.EINPROGRESS):
            raise OSError(code, os.strerror(code))
    except OSError as error:
        connection.close()
        raise refusal_of(error) from error
    return connection


def refusal_of(error: OSError) -> httpcore.ConnectError:
    """Why no connection was made."""
    if error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH):
        return Unreachable(str(error), "Check the address, and that this host has a way to it")
    return httpcore.ConnectError(str(error))


def _connected(family: socket.AddressFamily, address: Address, deadline: Deadline) -> socket.socket:
    """A connected socket. One attempt, looked at every ``STEP_S``: a new one each time would never reach a far host."""
    connection = connecting(family, address)
    try:
        poll = select.poll()
        poll.register(connection, select.POLLOUT)
        while not poll.poll(1000 * _step_s(deadline, httpcore.ConnectTimeout)):
            continue
        if code := connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise refusal_of(OSError(code, os.strerror(code)))
    except BaseException:
        connection.close()
        raise
    return connection


def _connected_unix(path: str, deadline: Deadline) -> socket.socket:
    """A connected unix socket. The kernel tells nobody when a full queue of connections has room again, so it is tried."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        while (code := connection.connect_ex(path)) == errno.EAGAIN:
            time.sleep(min(TRY_S, _step_s(deadline, httpcore.ConnectTimeout)))
        if code:
            raise _unusable(path, code)
    except BaseException:
        connection.close()
        raise
    return connection


def _unusable(path: str, code: int) -> Unreachable:
    """Why a connection over a unix socket was refused."""
    if code in (errno.EACCES, errno.EPERM):
        return Unreachable(
            f"no permission to use {path}", "The permissions of the socket and its folders decide who calls its server"
        )
    running = "Is the server running?"
    if code == errno.ECONNREFUSED and not Path(path).is_socket():
        return Unreachable(f"{path} is no socket", "Give the path that the server announced")
    if code == errno.ECONNREFUSED:
        return Unreachable(f"nobody listens on {path}", running)
    return Unreachable(f"{path}: {os.strerror(code)}", running)


def _step_s(deadline: Deadline, error: type[httpcore.TimeoutException]) -> float:
    """How long to wait before the deadline is looked at again."""
    left_s = deadline.remaining_s()
    if left_s <= 0:
        raise error("the deadline has passed")
    return min(STEP_S, left_s)


class _Stream(httpcore.NetworkStream):
    def __init__(self, connection: socket.socket, deadline: Deadline) -> None:
        self._connection = connection
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._patiently(lambda: self._connection.recv(max_bytes), httpcore.ReadTimeout, httpcore.ReadError)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        rest = memoryview(buffer)
        while rest:
            sent = self._patiently(lambda: self._connection.send(rest), httpcore.WriteTimeout, httpcore.WriteError)  # noqa: B023 - called before ``rest`` changes
            rest = rest[sent:]

    def close(self) -> None:
        self._connection.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        try:
            secured = ssl_context.wrap_socket(
                self._connection, server_hostname=server_hostname, do_handshake_on_connect=False
            )
        except OSError as error:
            self.close()
            raise httpcore.ConnectError(str(error)) from error
        stream = _Stream(secured, self._deadline)
        try:
            stream._handshake(secured)
        except BaseException:
            stream.close()
            raise
        return stream

    def get_extra_info(self, info: str) -> Any:
        if info == "ssl_object":
            return self._connection if isinstance(self._connection, ssl.SSLSocket) else None
        if info == "is_readable":
            poll = select.poll()
            poll.register(self._connection, select.POLLIN)
            return bool(poll.poll(0))
        return self._connection if info == "socket" else None

    def _handshake(self, secured: ssl.SSLSocket) -> None:
        """TLS as far as both sides agree; who speaks no TLS there, or is not trusted, is told apart from who is not there."""
        try:
            self._patiently(secured.do_handshake, httpcore.ConnectTimeout, httpcore.ConnectError)
        except httpcore.ConnectError as error:
            if isinstance(error.__cause__, ssl.SSLCertVerificationError):
                hint = "Name the authority that signed the certificate in the variable SSL_CERT_FILE"
                raise Unreachable(
                    f"the certificate is not trusted: {error.__cause__.verify_message}", hint, is_lasting=True
                ) from error
            if isinstance(error.__cause__, ssl.SSLError):
                raise Unreachable(
                    f"no TLS is spoken there: {error}", "Is it http:// instead of https://?", is_lasting=True
                ) from error
            raise

    def _patiently(
        self, step: Callable[[], T], late: type[httpcore.TimeoutException], broken: type[httpcore.NetworkError]
    ) -> T:
        """Repeat a call of the socket's that found nothing to do yet; TLS, too, goes on where it stopped."""
        while True:
            self._connection.settimeout(_step_s(self._deadline, late))
            try:
                return step()
            except (TimeoutError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                continue
            except OSError as error:
                raise broken(str(error)) from error
