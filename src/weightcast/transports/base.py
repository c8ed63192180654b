"""The contract of a transport: it moves the bytes of a plan between one trainer process and one worker process.

Both ends are given the same ordered ``copies`` (a trainer rank's part of a worker's plan). Life of a pair:

    trainer                                   worker
    end = T.trainer_end(copies, memory)
    offer = end.offer()        ──control──▶   end = T.worker_end(offer, copies)
    end.connect(deadline)      ◀─ data ──▶    end.connect(deadline)
                                              end.warm_up(memory, manifest)          may be left out
    end.send(deadline, part)   ── data ──▶    end.receive(memory, deadline, part)    once a round for each part, in this order on both
    end.close()                               end.close()

A *pull* transport's worker reads the trainer's memory in ``receive``; its ``send`` only makes the values visible and returns.
A *push* transport's ``send`` and ``receive`` run at the same time. Weights that lie still have one part, 0; those of a stream have one
for each window (``plan.parts_of``), and the memory of a part may be overwritten once it was sent (push) or received (pull).
Rules for every implementation:

- ``receive`` writes exactly the destination elements of the part's copies in the memory it is given, and nothing else
  (bytes between aligned tensors of an arena that the receiver owns may be overwritten with zeros).
- After an error or ``abort`` an end is dead: every later call raises TransportError at once; only ``close`` is left.
- ``abort`` may be called from any thread, returns at once and ends a blocked call on this end within a second.
- A dead peer is PeerLost, a passed deadline DeadlineExceeded; both before deadline + 1 s.
- ``close`` is idempotent, never raises and leaves nothing behind (segments, sockets, threads, descriptors), on either
  side, also when the other side died.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from weightcast.deadline import Deadline
from weightcast.errors import Unsupported
from weightcast.facts import Facts
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest
from weightcast.plan import Copy
from weightcast.transports.kept import Kept
from weightcast.transports.window_pipes import WindowPipes

DEFAULT_BUCKET_NBYTES = 64 * 2**20

__all__ = ["DEFAULT_BUCKET_NBYTES", "Facts", "TrainerEnd", "Transport", "WorkerEnd"]


class TrainerEnd(ABC):
    """The sending side of one pair. Not thread-safe but for ``abort``."""

    pipes: WindowPipes | None = None
    """What tells of windows of a stream in place of messages, where the pair has it."""

    @abstractmethod
    def offer(self) -> bytes:
        """Return the bytes that the worker needs to connect, in the transport's own msgpack form."""

    @abstractmethod
    def connect(self, deadline: Deadline) -> None:
        """Wait until the worker is connected."""

    @abstractmethod
    def send(self, deadline: Deadline, part: int = 0) -> int:
        """Send one round's values of a part to the worker (push), or make them visible to the worker (pull). Returns the bytes sent."""

    def feed(self, is_on: bool) -> None:  # noqa: B027 - most workers are in no chain
        """Have workers of a chain feed each other in the rounds that follow, or have each get everything from the trainer. They do
        until this is called. Called of ends of ``relayed_ends``, with the same for all of a chain."""

    def keep(self, kept: Kept, content: str, manifest: Manifest) -> None:
        """Have ``send_kept`` be called from now on, in place of ``send``. What is sent is kept in ``kept``, which ends of the same rank
        share, as ``content``. Called once, of ends whose transport ``carries_changes``."""
        raise Unsupported(f"{type(self).__name__} does not keep what it sends")

    def look(self, number: int, deadline: Deadline) -> None:
        """Find now what ``send_kept`` would find of round ``number``: the digest of what will be sent is known then."""
        raise Unsupported(f"{type(self).__name__} does not keep what it sends")

    def send_kept(self, number: int, deadline: Deadline, *, changes: bool) -> int:
        """Send the values of round ``number`` and keep them. Returns the bytes that were sent.

        ``changes``: the worker holds what this end sent last and calls ``receive_changes``, so that what has not changed since may be
        left out.
        """
        raise Unsupported(f"{type(self).__name__} does not keep what it sends")

    @abstractmethod
    def abort(self) -> None: ...

    @abstractmethod
    def close(self) -> None: ...


class WorkerEnd(ABC):
    """The receiving side of one pair. Not thread-safe but for ``abort``."""

    pipes: WindowPipes | None = None
    """What tells of windows of a stream in place of messages, where the pair has it. Open once the end is connected."""
    has_written: bool = True
    """Whether the last ``receive`` may have written anything. An end that cannot tell leaves the value True: live weights count as
    torn when a receive broke off."""

    @abstractmethod
    def connect(self, deadline: Deadline) -> None:
        """Connect to the trainer as the offer says."""

    def warm_up(self, memory: Memory, manifest: Manifest) -> None:  # noqa: B027 - not every transport compiles something
        """Compile, once connected, everything that the first ``receive_proven`` into ``memory`` would compile. Writes nothing into
        ``memory``. A receive into another memory stays possible."""

    @abstractmethod
    def receive(self, memory: Memory, deadline: Deadline, part: int = 0) -> int:
        """Write one round's values of a part into ``memory`` and return the bytes received. The values are in ``memory`` when the call
        returns, device work included."""

    def receive_proven(
        self, memory: Memory, manifest: Manifest, deadline: Deadline, part: int = 0
    ) -> tuple[int, int | None]:
        """Do what ``receive`` does, and return the digest of the bytes that were written, read back from ``memory``. The digest is None
        when the transport does not compute a digest on the way."""
        return self.receive(memory, deadline, part), None

    can_repeat: bool = False
    """Whether this end has all that the last round changed."""

    def receive_changes(
        self, memory: Memory, manifest: Manifest, deadline: Deadline, *, is_behind: bool = False
    ) -> tuple[int, int | None]:
        """Do what ``receive`` does, into a memory that holds what this end received last, so that only what changed since may come.
        Returns also what was added to the digest of the memory, as read from it before and after, or None where that was not looked at.

        ``is_behind``: the memory holds what came the round before, and gets the last round's changes first, which the end
        ``can_repeat``. Called of ends whose transport ``carries_changes``.
        """
        raise Unsupported(f"{type(self).__name__} takes no changes")

    @abstractmethod
    def abort(self) -> None: ...

    @abstractmethod
    def close(self) -> None: ...


class Transport(ABC):
    """A way to move bytes between two processes. A transport has no state but what it made reachable and has not given up; the
    registry holds one object of each class."""

    name: str
    pulls: bool
    """True when ``receive`` reads the trainer's memory. False when ``send`` and ``receive`` have to run at the same time."""
    carries_changes: bool = False
    """Whether ends have ``send_kept`` and ``receive_changes``."""
    default_bucket_nbytes: int = DEFAULT_BUCKET_NBYTES
    """The size of a bucket when the user gives none. A transport that packs keeps two buckets on either side."""
    preference: int = 0
    """Of the transports that suit a pair and that it can use, the one with the highest number is taken. tcp, which any pair can use, has 40."""

    @classmethod
    def suits(cls, trainer: Facts, worker: Facts) -> bool:
        """Whether the transport is meant for pairs like this one. Other pairs that can use the transport take it only where the user asks
        for it by name, and are not told why they did not take it."""
        return True

    @abstractmethod
    def refusal(self, trainer: Facts, worker: Facts) -> str | None:
        """Say, in words for a user, why this pair cannot use the transport; None when the pair can."""

    def sharing(self, workers: Sequence[Facts]) -> list[list[int]]:
        """Group the workers, by number, that ``trainer_ends`` can serve together. Workers of a group want the same bytes, which are sent
        once.

        The ends of a group depend on each other: all of them are connected, and used in a round, at the same time, as are the workers'
        ends. When one end breaks, all ends of the group break. A transport that shares nothing returns groups of one worker.
        """
        return [[number] for number in range(len(workers))]

    @abstractmethod
    def adopt(self, memory: Memory) -> Memory:
        """Make the trainer's memory reachable for workers. Called once, before any pair is made.

        Returns the memory to use from now on: the same object, or another one whose storages were moved. The source then rebinds its
        tensors to the returned memory.
        """

    @abstractmethod
    def release(self, memory: Memory) -> None:
        """Give up the memory that ``adopt`` made. Views into the memory stay valid. Never raises."""

    @abstractmethod
    def trainer_end(
        self, copies: Sequence[Copy], memory: Memory, *, bucket_nbytes: int = DEFAULT_BUCKET_NBYTES, address: str = ""
    ) -> TrainerEnd:
        """Make the sending side of one pair. ``memory`` is the memory that ``adopt`` returned."""

    def trainer_ends(
        self,
        count: int,
        copies: Sequence[Copy],
        memory: Memory,
        *,
        bucket_nbytes: int = DEFAULT_BUCKET_NBYTES,
        address: str = "",
    ) -> list[TrainerEnd]:
        """Make the sending sides for the ``count`` workers of one group of ``sharing``. The workers want the same copies, wherever these
        land: the destinations in ``copies`` are those of any one worker."""
        ends: list[TrainerEnd] = []
        try:
            for _ in range(count):
                ends.append(self.trainer_end(copies, memory, bucket_nbytes=bucket_nbytes, address=address))
        except BaseException:
            for end in ends:
                end.close()
            raise
        return ends

    def relays(self, copies: Sequence[Copy]) -> bool:
        """Whether workers that want these copies can feed each other, by ``relayed_ends``."""
        return False

    def relayed_ends(
        self,
        count: int,
        copies: Sequence[Copy],
        memory: Memory,
        *,
        bucket_nbytes: int = DEFAULT_BUCKET_NBYTES,
        address: str = "",
        patience_s: float = 5.0,
    ) -> list[TrainerEnd]:
        """Make the sending sides for the ``count`` workers of a chain. The trainer sends to the first one, and each feeds the next one
        while its own bytes come.

        The workers have equal plans and are in each round together. Each end lives for itself: what a worker does not get from the
        one before it the trainer sends. A neighbour that is silent for ``patience_s`` is given up.
        """
        raise Unsupported(f"workers do not feed each other by {self.name}")

    def ends_of(
        self,
        count: int,
        copies: Sequence[Copy],
        memory: Memory,
        *,
        bucket_nbytes: int = DEFAULT_BUCKET_NBYTES,
        address: str = "",
        patience_s: float = 0.0,
    ) -> list[TrainerEnd]:
        """Make ``relayed_ends`` where there is a patience, else ``trainer_ends``."""
        if not patience_s:
            return self.trainer_ends(count, copies, memory, bucket_nbytes=bucket_nbytes, address=address)
        return self.relayed_ends(
            count, copies, memory, bucket_nbytes=bucket_nbytes, address=address, patience_s=patience_s
        )

    @abstractmethod
    def worker_end(self, offer: bytes, copies: Sequence[Copy]) -> WorkerEnd:
        """Make the receiving side of one pair. Raises ProtocolError for a malformed offer."""
