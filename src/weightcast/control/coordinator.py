"""Coordinator: the trainer's side of the control channel, and its book of members."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import zmq

from weightcast.control.member import FRAME_NBYTES as FRAME_NBYTES
from weightcast.control.member import Member as Member
from weightcast.control.member import drained
from weightcast.control.pieces import PIECE_NBYTES, Joiner, TooLong, cut
from weightcast.control.pump import Pump, heartbeat_every, new_context, set_options
from weightcast.control.strangers import ADMISSION_S, EVENTS, Strangers
from weightcast.control.tickets import TICKET_LIFE_S, Tickets
from weightcast.deadline import Deadline
from weightcast.errors import (
    AuthError,
    ErrorForm,
    InvalidInput,
    ProtocolError,
    WeightcastError,
)
from weightcast.messages import (
    MAX_FRAME_NBYTES,
    AnyMessage,
    Bye,
    Failed,
    Heartbeat,
    Hello,
    Message,
    RankAnswer,
    Refused,
    decode,
    encode,
)
from weightcast.untrusted.seldom import Seldom

logger = logging.getLogger(__name__)

PROBE_S = 0.2
(HEARTBEAT,) = cut(encode(Heartbeat()))
LOOK_S = 0.1
"""How often a wait looks whether it still has a purpose."""
GOODBYE_S = 2.0
"""How long a goodbye waits at most for those that are told of it."""
MOST_MESSAGES = 256
"""Messages of one member that wait to be taken; no round and no set-up has as many."""


class Coordinator:
    """Binds a port, admits members by ticket and keeps what they say. Calls are thread-safe and end by their deadline."""

    def __init__(self, host: str = "127.0.0.1", *, silence_s: float = 5.0, admission_s: float = ADMISSION_S) -> None:
        self.silence_s = silence_s
        """For so long a member may be silent, and the trainer for a member."""
        self._strangers = Strangers(admission_s)
        self._members: dict[bytes, Member] = {}
        self._leaving: set[bytes] = set()
        """Identities that were told goodbye and have not answered."""
        self._tickets = Tickets()
        self._lock = threading.RLock()
        self._came = threading.Condition(self._lock)
        """A member was admitted, or dropped."""
        self._answered = threading.Condition(self._lock)
        """A goodbye was answered."""
        self.epoch = 0
        """Messages that belong to another epoch are dropped when they arrive."""
        self._welcome: Callable[[Member], Message] | None = None
        self._context = new_context()
        socket = self._context.socket(zmq.ROUTER)
        set_options(socket, silence_s)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        public, secret = zmq.curve_keypair()
        socket.curve_publickey, socket.curve_secretkey, socket.curve_server = public, secret, True
        self.public_key = public.decode()
        try:
            self.port = socket.bind_to_random_port(f"tcp://{host}")
        except zmq.ZMQError as error:
            socket.close()
            self._context.term()
            raise InvalidInput(
                f"cannot listen on {host}: {error}", field="address", hint="Give an address of this machine"
            ) from None
        self._pump = Pump(
            self._context,
            socket,
            self._frames,
            self._tick,
            "weightcast-coordinator",
            tick_s=heartbeat_every(silence_s),
            on_unsent=self._unsent,
            on_event=self._strangers.note,
            events=EVENTS,
        )
        self._closed = False
        self._seldom = Seldom(logger)
        self._pump.start()

    # -- admission

    def greet_with(self, welcome: Callable[[Member], Message]) -> None:
        """What to answer a member that was admitted; called on the I/O thread."""
        self._welcome = welcome

    def issue_ticket(
        self,
        engine: str,
        world_size: int,
        life_s: float = TICKET_LIFE_S,
        *,
        large_nbytes: int = MAX_FRAME_NBYTES,
        is_trusted: bool = False,
    ) -> str:
        """A ticket that admits each rank of one engine once, within ``life_s``; earlier tickets of the engine are void.

        Each may say one thing of up to ``large_nbytes`` bytes; those who are trusted, as ranks of the trainer itself, any number.
        """
        with self._lock:
            return self._tickets.issue(engine, world_size, life_s, large_nbytes=large_nbytes, is_trusted=is_trusted)

    def _admit(self, identity: bytes, hello: Hello) -> Member:
        ticket = self._tickets.redeem(hello)
        for member in self._members.values():
            if member.key == (hello.engine, hello.rank) and member.lost is None:
                member.lose("replaced by a newer worker")
        return Member(
            hello.engine,
            hello.rank,
            identity,
            hello,
            threading.Condition(self._lock),
            large_nbytes=ticket.large_nbytes,
            is_trusted=ticket.is_trusted,
        )

    # -- talking

    def send(self, member: Member, message: Message) -> None:
        """Queue a message; returns at once."""
        self._send(member.identity, message)

    def _send(self, identity: bytes, message: Message) -> None:
        for piece in cut(encode(message)):
            self._pump.send(identity, piece)

    def members(self, engine: str | None = None) -> list[Member]:
        """Members that are alive, by engine and rank."""
        with self._lock:
            alive = [m for m in self._members.values() if m.lost is None and engine in (None, m.engine)]
        return sorted(alive, key=lambda member: member.key)

    def wait_members(self, engine: str, world_size: int, deadline: Deadline) -> list[Member]:
        """Wait until all workers of an engine were admitted."""
        with self._came:
            while True:
                present = [m for m in self._members.values() if m.engine == engine and m.lost is None]
                if len(present) == world_size:
                    return sorted(present, key=lambda member: member.key)
                self._came.wait(min(deadline.remaining_s(), LOOK_S))
                if deadline.passed:
                    raise deadline.exceeded(
                        "waiting for workers",
                        f"{len(present)} of {world_size} workers joined in {deadline.timeout_s:g} s",
                        engine=engine,
                        phase="join",
                        hint="Check that the engine can reach the trainer's control address",
                    )

    def take(
        self,
        member: Member,
        wanted: type[Message],
        deadline: Deadline,
        *,
        phase: str,
        matches: Callable[[Message], bool] = lambda _: True,
        cancelled: Callable[[], WeightcastError | None] = lambda: None,
    ) -> Message:
        """Wait for a message of one kind from one member and take it out of its inbox.

        Raises what a Failed or Refused message reports, PeerLost when the member is lost, DeadlineExceeded, or what
        ``cancelled`` returns (asked at least every 0.1 s). Other messages stay.
        """
        with self._lock:
            while (said := member.said(wanted, matches, phase)) is None:
                said = cancelled() or member.late(deadline, phase)
                if said is not None:
                    break
                member.changed.wait(min(deadline.remaining_s(), LOOK_S))
        if isinstance(said, WeightcastError):
            raise said
        return said

    def check(
        self,
        member: Member,
        deadline: Deadline,
        *,
        phase: str,
        matches: Callable[[Message], bool],
        cancelled: Callable[[], WeightcastError | None],
    ) -> None:
        """Raise what ``take`` would raise now; return where ``take`` would wait."""
        with self._lock:
            said = member.said(Refused, matches, phase) or cancelled() or member.late(deadline, phase)
        if isinstance(said, WeightcastError):
            raise said

    def take_each(
        self,
        members: Sequence[Member],
        wanted: type[Message],
        deadline: Deadline,
        *,
        phase: str,
        matches: Callable[[Message], bool] = lambda _: True,
        cancelled: Callable[[Member], WeightcastError | None] = lambda _: None,
    ) -> Iterator[tuple[Member, Message | WeightcastError]]:
        """``take`` from many members on one thread: each with what it said, or with the error that ``take`` would raise, as they come.

        One call at a time waits for a member in this way.
        """
        news: queue.SimpleQueue[Member] = queue.SimpleQueue()
        waiting = dict.fromkeys(members)
        for member in members:
            member.on_news = news.put
        try:
            fresh: Iterable[Member] = members
            looked_at = time.monotonic()
            while waiting:
                for member in fresh:
                    with self._lock:
                        said = member.said(wanted, matches, phase) if member in waiting else None
                    if said is not None:
                        del waiting[member]
                        yield member, said
                if time.monotonic() >= looked_at + LOOK_S or deadline.passed:
                    looked_at = time.monotonic()
                    for member in list(waiting):
                        over = cancelled(member) or member.late(deadline, phase)
                        if over is not None:
                            del waiting[member]
                            yield member, over
                fresh = drained(news, min(deadline.remaining_s(), LOOK_S)) if waiting else ()
        finally:
            for member in members:
                member.on_news = None

    def probe(self, members: Iterable[Member]) -> None:
        """Say something to members, so that those whose connection has closed are lost at once; takes at most a moment."""
        for member in members:
            if member.lost is None:
                self._pump.send(member.identity, HEARTBEAT)
        self._pump.flush(PROBE_S)

    def clear_inboxes(self, members: Iterable[Member]) -> None:
        """Throw away what members said about rounds and epochs that are over."""
        with self._lock:
            for member in members:
                member.inbox.clear()

    def forget(self, members: Iterable[Member], reason: str = "dismissed", *, settled: bool = False) -> None:
        """Say goodbye to members and drop them. Lost ones are told, too: they may only have been stopped for a while.

        ``settled``: no round will be taken back in them any more.
        """
        for member in list(members):
            with self._lock:
                if member.lost is None:
                    self._leaving.add(member.identity)
                member.lose(reason)
                self._members.pop(member.identity, None)
            self.send(member, Bye(reason=reason, settled=settled))

    def wait_goodbyes(self, timeout_s: float = GOODBYE_S) -> None:
        """Wait until those that were told goodbye have heard it, or are gone: from then on their engines are free for another trainer.

        After ``timeout_s`` the rest is not waited for any more: such a worker is stopped, and hears it when it goes on.
        """
        deadline = Deadline(timeout_s)
        with self._lock:
            while self._leaving and not deadline.passed and not self._pump.is_this_thread:
                self._answered.wait(min(deadline.remaining_s(), LOOK_S))
                for identity in self._leaving:  # a closed connection answers, too
                    self._pump.send(identity, HEARTBEAT)
            self._leaving.clear()

    def forget_engine(self, engine: str, reason: str, *, settled: bool) -> None:
        """``forget`` everybody of one engine, those that were lost before anybody counted them as well."""
        with self._lock:
            members = [member for member in self._members.values() if member.engine == engine]
        self.forget(members, reason, settled=settled)

    def close(self, goodbye_s: float = 0.0) -> None:
        """Dismiss everybody, wait at most so long until they have heard it, and free the port; idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            self.forget(list(self._members.values()), "the trainer closed")
            if goodbye_s:
                self.wait_goodbyes(goodbye_s)
        finally:
            self._pump.close()

    # -- on the I/O thread

    def _frames(self, parts: list[zmq.Frame]) -> None:
        identity, piece = parts[0].bytes, parts[-1].bytes
        member = self._members.get(identity)
        if member is not None and member.lost is not None:
            return
        is_leaving = identity in self._leaving  # what it says was said before it heard the goodbye
        try:
            # Who is not admitted says one short thing: hello.
            frame = Joiner().add(piece, PIECE_NBYTES) if member is None else member.hear(piece)
            message = None if frame is None else decode(frame)
        except ProtocolError as error:
            if not is_leaving:
                self._seldom.warn("control channel: dropped a frame from a peer", about=str(error))
            if member is not None and isinstance(error, TooLong):
                self._lose(member, f"it sent {error.message}")
            return
        if member is None:
            if message is not None:
                self._first(identity, message, int(parts[-1].get(zmq.SRCFD)))
            return
        if isinstance(message, Bye):
            self._lose(member, f"it left: {message.reason}", said_goodbye=True)
        elif message is not None:
            self._keep(member, message)

    def _keep(self, member: Member, message: AnyMessage) -> None:
        """Put a message into its member's inbox, unless it belongs to an epoch that is over."""
        if getattr(message, "epoch", self.epoch) != self.epoch:
            return
        if len(member.inbox) >= MOST_MESSAGES:
            self._lose(member, f"it sent {MOST_MESSAGES} messages that nobody waited for")
            return
        with self._lock:
            member.inbox.append(message)
            if member.on_trouble is not None and (
                isinstance(message, Failed) or (isinstance(message, RankAnswer) and message.failed)
            ):
                member.on_trouble(message)
            member.tell()

    def _lose(self, member: Member, reason: str, *, said_goodbye: bool = False) -> None:
        with self._lock:
            member.lose(reason, said_goodbye=said_goodbye)

    def _first(self, identity: bytes, message: AnyMessage, descriptor: int) -> None:
        if not isinstance(message, Hello):
            if isinstance(message, Bye):
                self._note_goodbye(identity)
            elif identity not in self._leaving:
                self._seldom.warn(
                    "control channel: a message from a peer that was not admitted", about=type(message).__name__
                )
            return
        with self._lock:
            try:
                member = self._admit(identity, message)
            except AuthError as error:
                who = f"engine {message.engine!r} rank {message.rank}"
                self._seldom.warn("control channel: refused a worker", about=f"{who}: {error}")
                self._send(identity, Refused(error=ErrorForm.of(error)))
                return
            self._members[identity] = member
            self._came.notify_all()
        self._pump.hear_events()  # this connection's beginning among them, so that it does not count afterwards
        self._strangers.admit(descriptor)
        if self._welcome is not None:
            self.send(member, self._welcome(member))

    def _note_goodbye(self, identity: bytes) -> None:
        with self._lock:
            self._leaving.discard(identity)
            self._answered.notify_all()

    def _unsent(self, parts: list[bytes]) -> None:
        while not self._pump.receive_all():  # what the member said before it left counts
            pass
        self._note_goodbye(parts[0])
        with self._lock:
            member = self._members.get(parts[0])
            if member is not None and member.lost is None:
                member.lose(f"its connection closed, or it was silent for {self.silence_s:g} s")

    def _tick(self) -> None:
        closed = self._strangers.close_late()
        if closed:
            self._seldom.warn("control channel: closed connections of peers that were not admitted", about=str(closed))
        for member in self.members():
            self._pump.send(member.identity, HEARTBEAT)
