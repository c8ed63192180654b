"""ControlLink: a member's side of the control channel."""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable

import msgspec
import zmq
from zmq.utils import z85

from weightcast.control.pieces import Joiner, TooLong, cut
from weightcast.control.pump import HEARTBEAT_S, Pump, new_context, set_options
from weightcast.deadline import Deadline
from weightcast.errors import InvalidInput, ProtocolError
from weightcast.messages import MAX_FRAME_NBYTES, AnyMessage, Bye, Heartbeat, Message, decode, encode
from weightcast.untrusted.secret import repr_without
from weightcast.untrusted.seldom import Seldom

logger = logging.getLogger(__name__)


class JoinInfo(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What ``init_info`` carries: where the coordinator is, its key, and the ticket of this engine."""

    address: str
    """ZeroMQ endpoint, "tcp://host:port"."""
    public_key: str
    """The coordinator's CURVE key, 40 characters of Z85."""
    ticket: str
    engine: str
    """The name by which the coordinator knows this engine."""
    timeout_s: float = 60.0
    silence_s: float = 5.0
    """Either side takes the other one for lost when it is silent for so long."""
    takeover: bool = False
    """Leave a trainer that is still alive; without it a second trainer is refused."""
    session: str = ""
    """Names the trainer's publisher: the same one may join again while the engine still believes in its former stay."""
    left: tuple[str, ...] = ()
    """Names of engines that the publisher dismissed lately: an engine that still believes in its stay under one of them may join under
    another name."""

    __repr__ = repr_without("ticket")

    def __post_init__(self) -> None:
        if not self.address.startswith("tcp://"):
            raise InvalidInput(f"address is tcp://host:port, not {self.address!r}", field="address")
        try:
            valid = len(z85.decode(self.public_key)) == 32
        except (ValueError, KeyError, IndexError, struct.error):  # whatever the decoder stumbles over
            valid = False
        if not valid:
            raise InvalidInput("public_key is not a CURVE key", field="public_key")
        if not 0 < self.timeout_s <= 86400:
            raise InvalidInput("timeout_s is between 0 and 86400 seconds", field="timeout_s")
        if not 0 < self.silence_s <= 86400:
            raise InvalidInput("silence_s is between 0 and 86400 seconds", field="silence_s")


class ControlLink:
    """Connects to a coordinator. ``on_message`` and ``on_lost`` run on the I/O thread and must not block.

    ``on_lost(reason)`` comes at most once, and not after ``close``. A lost link frees its socket and its thread by itself:
    the coordinator knows a member by its connection, so there is nothing to come back to.
    """

    def __init__(
        self,
        info: JoinInfo,
        on_message: Callable[[AnyMessage], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self._on_message = on_message
        self._on_lost = on_lost
        self._limit = Deadline(info.timeout_s)
        self._address, self._silence_s = info.address, info.silence_s
        self._is_answered = False
        self._ended = False
        self.said_goodbye = False
        """The coordinator left in an orderly way; told before ``on_lost``."""
        self.settled = False
        """The coordinator left, and takes no round back any more; told before ``on_lost``."""
        self._joiner = Joiner()
        self._seldom = Seldom(logger)
        self._context = new_context()
        socket = self._context.socket(zmq.DEALER)
        set_options(socket, info.silence_s)
        public, secret = zmq.curve_keypair()
        socket.curve_publickey, socket.curve_secretkey = public, secret
        socket.curve_serverkey = info.public_key.encode()
        try:
            socket.connect(info.address)
        except zmq.ZMQError as error:
            socket.close()
            self._context.term()
            raise InvalidInput(f"cannot connect to {info.address}: {error}", field="address") from None
        self._pump = Pump(
            self._context,
            socket,
            self._frames,
            self._tick,
            "weightcast-control",
            tick_s=HEARTBEAT_S,
            on_event=self._disconnected,
        )
        self._pump.start()

    def send(self, message: Message) -> None:
        """Queue a message; returns at once."""
        for piece in cut(encode(message)):
            self._pump.send(piece)

    def close(self, reason: str = "closed") -> None:
        """Say goodbye and leave; idempotent."""
        if not self._ended:
            self._ended = True
            self.send(Bye(reason=reason, settled=True))
        self._pump.close()

    def _frames(self, parts: list[zmq.Frame]) -> None:
        self._is_answered = True
        if self._ended:
            return
        try:
            frame = self._joiner.add(parts[-1].bytes, MAX_FRAME_NBYTES)
            if frame is None:
                return
            message = decode(frame)
        except ProtocolError as error:
            self._seldom.warn("control channel: dropped a frame from the trainer", about=str(error))
            if isinstance(error, TooLong):
                self._lose(f"the trainer sent {error.message}")
            return
        if isinstance(message, Heartbeat):
            return
        if isinstance(message, Bye):
            self.said_goodbye, self.settled = True, message.settled
            self._lose(f"the trainer left: {message.reason}", answer=Bye(reason="heard", settled=True))
            return
        self._on_message(message)

    def _disconnected(self, event: int, descriptor: int) -> None:
        while not self._pump.receive_all():  # what the trainer said before it left counts
            pass
        if self._is_answered:
            self._lose(f"the trainer's connection closed, or it was silent for {self._silence_s:g} s")
        else:
            self._lose(f"the connection to {self._address} closed before the trainer had answered")

    def _tick(self) -> None:
        if not self._is_answered and self._limit.passed:
            self._lose(f"the trainer did not answer in {self._limit.timeout_s:g} s")

    def _lose(self, reason: str, answer: Message | None = None) -> None:
        if self._ended:
            return
        self._ended = True
        try:
            self._on_lost(reason)
        finally:
            if answer is not None:  # last: whoever hears it may send another trainer here
                self.send(answer)
            self._pump.stop()
