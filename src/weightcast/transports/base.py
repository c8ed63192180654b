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
from weightcast.facts import Facts
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest
from weightcast.plan import Copy

DEFAULT_BUCKET_NBYTES = 64 * 2**20

__all__ = ["DEFAULT_BUCKET_NBYTES", "Facts", "TrainerEnd", "Transport", "WorkerEnd"]


class TrainerEnd(ABC):
    """The sending side of one pair. Not thread-safe but for ``abort``."""

    @abstractmethod
    def offer(self) -> bytes:
        """What the worker needs to connect, in the transport's own msgpack form."""

    @abstractmethod
    def connect(self, deadline: Deadline) -> None:
        """Wait until the worker is connected."""

    @abstractmethod
    def send(self, deadline: Deadline, part: int = 0) -> int:
        """Make one round's values of a part reach the worker (push) or visible to it (pull); returns bytes sent."""

    @abstractmethod
    def abort(self) -> None: ...

    @abstractmethod
    def close(self) -> None: ...


class WorkerEnd(ABC):
    """The receiving side of one pair. Not thread-safe but for ``abort``."""

    has_written: bool = True
    """Whether the last ``receive`` may have written anything. Ends that cannot tell leave it True: live weights count as torn
    where a receive broke off."""

    @abstractmethod
    def connect(self, deadline: Deadline) -> None:
        """Connect to the trainer as the offer says."""

    def warm_up(self, memory: Memory, manifest: Manifest) -> None:  # noqa: B027 - not every transport compiles something
        """Do ahead, once connected, what the first ``receive_proven`` into ``memory`` would do beside moving bytes; writes
        nothing there. A receive into another memory stays possible."""

    @abstractmethod
    def receive(self, memory: Memory, deadline: Deadline, part: int = 0) -> int:
        """Write one round's values of a part into ``memory``; when it returns, they are there (device work included).
        Returns bytes received."""

    def receive_proven(
        self, memory: Memory, manifest: Manifest, deadline: Deadline, part: int = 0
    ) -> tuple[int, int | None]:
        """``receive``, and the digest of all that it wrote, read back from ``memory``, where the transport gets it on the
        way; None where it has to be computed afterwards."""
        return self.receive(memory, deadline, part), None

    @abstractmethod
    def abort(self) -> None: ...

    @abstractmethod
    def close(self) -> None: ...


class Transport(ABC):
    """A way to move bytes. Stateless; the registry holds one object of each class."""

    name: str
    pulls: bool
    """True: ``receive`` reads the trainer's memory; False: ``send`` and ``receive`` meet."""
    default_bucket_nbytes: int = DEFAULT_BUCKET_NBYTES
    """Bytes of a bucket where nobody says; a transport that packs keeps two on either side."""

    @abstractmethod
    def refusal(self, trainer: Facts, worker: Facts) -> str | None:
        """Why this pair cannot use the transport, in words for a user; None when it can."""

    def sharing(self, workers: Sequence[Facts]) -> list[list[int]]:
        """Which of these workers, by number, ``trainer_ends`` can serve together, where they want the same: it is sent once.

        The ends of a group depend on each other: all are connected, and used in a round, at the same time, as are the
        workers' ends, and when one breaks all do. A transport that shares nothing has groups of one.
        """
        return [[number] for number in range(len(workers))]

    @abstractmethod
    def adopt(self, memory: Memory) -> Memory:
        """Make the trainer's memory reachable for workers; called once, before any pair.

        Returns the memory to use from now on: the same object, or one whose storages were moved (the source then
        rebinds its tensors to it).
        """

    @abstractmethod
    def release(self, memory: Memory) -> None:
        """Give up what ``adopt`` made. Views into the memory stay valid; names of segments are gone. Never raises."""

    @abstractmethod
    def trainer_end(
        self, copies: Sequence[Copy], memory: Memory, *, bucket_nbytes: int = DEFAULT_BUCKET_NBYTES, address: str = ""
    ) -> TrainerEnd:
        """The sending side for one pair; ``memory`` is what ``adopt`` returned."""

    def trainer_ends(
        self,
        count: int,
        copies: Sequence[Copy],
        memory: Memory,
        *,
        bucket_nbytes: int = DEFAULT_BUCKET_NBYTES,
        address: str = "",
    ) -> list[TrainerEnd]:
        """The sending sides for the ``count`` workers of one group of ``sharing``, which want the same copies wherever these land;
        of ``copies`` the destinations are any worker's."""
        ends: list[TrainerEnd] = []
        try:
            for _ in range(count):
                ends.append(self.trainer_end(copies, memory, bucket_nbytes=bucket_nbytes, address=address))
        except BaseException:
            for end in ends:
                end.close()
            raise
        return ends

    @abstractmethod
    def worker_end(self, offer: bytes, copies: Sequence[Copy]) -> WorkerEnd:
        """The receiving side; raises ProtocolError for a malformed offer."""
