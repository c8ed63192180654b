"""What the trainer knows of its engines and their workers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from weightcast.control.coordinator import Member
from weightcast.deadline import Deadline
from weightcast.digest.versions import INITIAL_VERSION, version_number
from weightcast.errors import DeadlineExceeded, EngineError, InvalidInput, ProtocolError, WeightcastError
from weightcast.layout.table import DTYPE, TENSOR
from weightcast.manifest import Manifest
from weightcast.manifest.dtypes import DTYPE_NAMES, DTYPE_NUMBERS, ITEMSIZES, itemsize_of
from weightcast.manifest.names import kind_of
from weightcast.messages import Failed, Landings, RankAnswer
from weightcast.plan import Plan
from weightcast.quoted import quoted
from weightcast.trainer.clients.base import EngineClient
from weightcast.trainer.fleet.codec import Codec
from weightcast.trainer.fleet.feeding import Feeding
from weightcast.trainer.fleet.places import Places
from weightcast.transports.base import Transport
from weightcast.transports.window_pipes import WindowPipes

UNKNOWN = "unknown"
BELIEVED_NUMBER = 10**12
"""The highest version number that a trainer believes of an engine while it knows of none itself: thousands of years of rounds."""
BELIEVED_LEAD = 10**9
"""How far an engine may be ahead of what the trainer knows. Numbers go on after what is believed, so whoever lies cannot use them
up: they have MAX_DIGITS digits (see digest)."""


class SendingEnd(Protocol):
    """What a round does with the sending side of a worker's pairs: a TrainerEnd, or one that several ranks share."""

    @property
    def pipes(self) -> WindowPipes | None: ...

    def connect(self, deadline: Deadline) -> None: ...

    def feed(self, is_on: bool) -> None: ...

    def send(self, deadline: Deadline, part: int = 0) -> int: ...

    def look(self, number: int, deadline: Deadline) -> None: ...

    def send_kept(self, number: int, deadline: Deadline, *, changes: bool) -> int: ...

    def abort(self) -> None: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class WorkerLink:
    """One worker of an engine, as the trainer sees it."""

    member: Member
    landings: Landings
    transport: Transport | None = None
    plan: Plan | None = None
    parts: tuple[int, ...] = (0,)
    """The parts that rank 0 gives it: windows of a stream, or 0."""
    reason: str = ""
    unusable: dict[str, str] = field(default_factory=dict)
    """Transports that were tried with this worker and cannot be used, and why."""
    site: str = ""
    """Where it and other workers feed each other, since its pairs were set up; empty where it gets its bytes from the trainer."""
    suspicion: str = ""
    """Why it shall be in no chain, since a round found that; empty where nothing speaks against it."""
    no_relay: str = ""
    """Why it is in no chain although it is in a site, since its pairs were set up."""
    fed_by: str = ""
    """The worker before it in its chain; empty for the first one, and in no chain."""
    feeding: Feeding | None = None
    """Whether its chain is used; None in no chain."""
    end: SendingEnd | None = None
    codec: Codec = field(default_factory=lambda: Codec(wish=False))
    """Whether its rounds bring all values or changes, since its pairs were set up."""
    digest_key: str = ""
    at: tuple[int, int] = (0, 0)
    """The (epoch, round) that the pair is used for now; round 0 is the set-up."""

    through_loader: tuple[str, ...] = field(init=False)
    """Tensors that the engine's own loader places while the engine stands still, with ``#`` for each number."""
    waiting: Deadline | None = None
    """What a call to its engine waits by, which ends when the worker is lost."""

    def __post_init__(self) -> None:
        self.member.on_trouble = self._wake
        self.through_loader = tuple(sorted(set(map(kind_of, self.landings.layout.through_loader))))

    def _wake(self, trouble: Failed | RankAnswer | None) -> None:
        """End a wait for a worker that is lost, or that has said that it will not come."""
        end, waiting = self.end, self.waiting
        if trouble is None and waiting is not None:
            waiting.cancel()
        is_here = isinstance(trouble, Failed) and (trouble.epoch, trouble.round) == self.at
        if end is not None and (trouble is None or is_here):
            end.abort()

    def named(self, error: WeightcastError) -> WeightcastError:
        """The error, or the loss of the worker where that is what broke the pair."""
        if self.member.lost is None or isinstance(error, DeadlineExceeded):
            return error
        return self.member.gone()

    @property
    def reasons(self) -> str:
        """Why it has its transport, and why it gets its bytes from whom it does where relays were asked for."""
        feeding, said = self.feeding, self.reason
        if feeding is not None and feeding.is_on and self.fed_by:
            said += f"; fed by {self.fed_by}"
        why = self.no_relay if feeding is None else feeding.reason
        return f"{said}; {why}" if why else said

    @property
    def in_place(self) -> bool:
        return self.landings.mode == "in_place"

    @property
    def pulls(self) -> bool:
        """Whether its transport reads the trainer's memory."""
        return self.transport is not None and self.transport.pulls

    def close_end(self) -> None:
        if self.end is not None:
            self.end.close()
            self.end = None


def _believed(number: int, known: int) -> int:
    limit = known + BELIEVED_LEAD if known else BELIEVED_NUMBER
    if number > limit:
        raise ProtocolError(
            f"it says that it has had version number {number}, and {known or 'none'} is the highest that this trainer knows of",
            hint="Restart the engine, whose numbers begin anew then; or give the Publisher the log= of the one before it",
        )
    return number


@dataclass(slots=True, eq=False)
class EngineLink:
    """One engine of the fleet. ``broken`` says why it has to be set up again, or admitted again (``joined`` False).

    ``version`` is UNKNOWN when the engine could not be asked after a commit that may have happened.
    """

    client: EngineClient
    workers: list[WorkerLink] = field(default_factory=list)
    joined: bool = False
    was_here: bool = False
    """It joined before. Takeover is spent with that: whoever has it now came later, and is not to be put out by its predecessor."""
    broken: str | None = "not set up"
    version: str = INITIAL_VERSION
    digest: str = ""
    dirty: bool = False
    mates: frozenset[str] = frozenset()
    """The engines, itself included, that its pairs are shared with: none of them can be in a round without the others."""
    highest: int = 0
    """The highest version number that it may have served, as it said when it joined."""
    places: Places = field(default_factory=Places)
    """Which published tensors it has no place for, and which share one."""

    def __post_init__(self) -> None:
        name = self.client.name
        if name != quoted(name):
            raise InvalidInput(f"an engine's name is printable text on one line, not {name[:80]!r}", field="engines")

    @property
    def name(self) -> str:
        return self.client.name

    @property
    def base(self) -> str | None:
        """Digest of the content that its workers serve, empty for one that nobody published; None where that cannot be told."""
        return None if self.dirty or self.version == UNKNOWN else self.digest

    @property
    def in_place(self) -> bool:
        return any(worker.in_place for worker in self.workers)

    def greet(self, workers: list[WorkerLink], known: int = 0) -> None:
        """Take over what its workers said when they joined. Workers that serve different things are an engine that serves
        no version. ``known`` is the highest number that the trainer knows of; ProtocolError for one that nobody can believe."""
        hellos = [worker.member.hello for worker in workers]
        self.version, self.digest = hellos[0].version, hellos[0].digest
        self.dirty = any(hello.dirty for hello in hellos) or len({(h.version, h.digest) for h in hellos}) > 1
        self.highest = _believed(max(max(hello.highest, version_number(hello.version)) for hello in hellos), known)
        self.workers, self.broken, self.joined = workers, "not set up", True
        self.was_here = True

    def learn(self, status: Mapping[str, Any]) -> None:
        """Take over what the engine itself says that it serves; EngineError when it does not say that."""
        version, dirty = status.get("weight_version"), status.get("dirty")
        if not isinstance(version, str) or not isinstance(dirty, bool):
            raise EngineError("its status does not say what it serves", engine=self.name)
        self.version, self.dirty = version, dirty
        self.digest = str(status.get("digest") or "")

    def wider(self, manifest: Manifest, dtype: str) -> dict[str, str]:
        """The tensors published in ``dtype`` that a worker keeps in a wider type, and that type."""
        found: dict[str, str] = {}
        for worker in self.workers:
            tensors, dtypes = worker.landings.layout.placements.numbers()[[TENSOR, DTYPE]]
            is_wider = manifest.dtype_numbers[tensors] == DTYPE_NUMBERS[dtype]
            is_wider &= ITEMSIZES[dtypes] > itemsize_of(dtype)
            for tensor, kept in zip(tensors[is_wider].tolist(), dtypes[is_wider].tolist(), strict=True):
                found[manifest.tensors[tensor].name] = DTYPE_NAMES[kept]
        return found

    @contextmanager
    def while_there(self, deadline: Deadline) -> Iterator[Deadline]:
        """A part of the deadline that ends when a worker is lost. PeerLost in place of the DeadlineExceeded of that."""
        part = deadline.part()
        for worker in self.workers:
            worker.waiting = part
        try:
            if self.lost() is not None:
                part.cancel()
            yield part
        except DeadlineExceeded as error:
            gone = next((worker.member.gone() for worker in self.workers if worker.member.lost), None)
            if gone is None:
                raise
            gone.worker = self.suspect()
            raise gone from error
        finally:
            for worker in self.workers:
                worker.waiting = None

    def suspect(self) -> int | None:
        """The rank of the worker that a failure is about which names none: the only one, or the one that is lost."""
        ranks = [w.member.rank for w in self.workers if w.member.lost is not None or len(self.workers) == 1]
        return ranks[0] if len(ranks) == 1 else None

    def lost(self) -> str | None:
        """Why a worker is gone, if one is."""
        return next((worker.member.lost for worker in self.workers if worker.member.lost), None)
