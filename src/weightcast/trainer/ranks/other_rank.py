"""OtherRank: a trainer rank that is not rank 0. It holds its part and does, inside collective calls, what rank 0 orders.

Orders come on the control link's I/O thread, which only queues them; the thread that made the call works them off. What may take
long (connecting, sending, digesting) runs beside it, so that an abort is heard.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import assert_never

from weightcast.content.expected import ExpectedDigest
from weightcast.control.link import ControlLink, JoinInfo
from weightcast.cuda.wait import own_stream
from weightcast.deadline import Deadline
from weightcast.errors import (
    DeadlineExceeded,
    ErrorForm,
    PeerLost,
    ProtocolError,
    StateError,
    TransportError,
    WeightcastError,
)
from weightcast.layout.table import LayoutTable
from weightcast.manifest import Manifest
from weightcast.messages import AnyMessage, Hello, RankAnswer, RankOrder, Refused, Welcome
from weightcast.report.model import Report
from weightcast.sources.base import Source
from weightcast.sources.holder import Holder
from weightcast.trainer.ranks.line import LATE_HINT, LOST_HINT, RANKS
from weightcast.trainer.ranks.orders import (
    Abort,
    Adopt,
    Agree,
    Answer,
    Answered,
    AnyOrder,
    AtOnce,
    Beside,
    Connect,
    CountNonFinite,
    Digest,
    Enter,
    Exhaust,
    Expect,
    Finish,
    Keep,
    LetGo,
    Pair,
    Refresh,
    Release,
    Renew,
    Send,
    Survey,
    decode_order,
    encode,
)
from weightcast.transports.base import TrainerEnd
from weightcast.transports.facts import local_facts
from weightcast.transports.kept import Kept
from weightcast.transports.registry import registry
from weightcast.untrusted.seldom import Seldom

logger = logging.getLogger(__name__)

GRACE_S = 1.9
"""How long after a call's deadline rank 0 may still say how it ended: it takes back first what was committed."""
MAX_THREADS = 512
"""One for each worker of the fleet that is sent to: those of a group wait for each other."""

_Item = tuple[RankOrder, AnyOrder]


class OtherRank:
    """One rank's part of the calls of a Publisher of several ranks. Not thread-safe: one call at a time."""

    _failure: Exception | None = None
    """Why this rank has nothing to publish in the call that runs."""

    def __init__(self, holder: Holder, info: JoinInfo, *, rank: int, size: int, address: str) -> None:
        source = holder.source
        self._holder, self._rank, self._address = holder, rank, address
        self._manifest: Manifest = source.manifest
        self.expected: dict[str, ExpectedDigest] = {}
        """Digests that rounds need of what this rank holds, by key."""
        self.kept = Kept()
        """What this rank sent last, for rounds that send changes."""
        self.last_report: Report | None = None
        self._release: Callable[[], object] | None = None
        self._ends: dict[int, _KeptEnd] = {}
        self._orders: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._lost: str | None = None
        self._refused: WeightcastError | None = None
        self._call = 0
        self._left = 0
        """The last call that this rank gave up: orders of it come too late."""
        self._pool = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="weightcast-rank")
        self._seldom = Seldom(logger)
        self._link = ControlLink(info, self._on_message, self._on_lost)
        self._link.send(
            Hello(
                ticket=info.ticket,
                engine=RANKS,
                rank=rank - 1,
                world_size=size - 1,
                facts=local_facts(source.device, files=source.memory.files),
                version="",
                digest="",
                dirty=False,
                highest=0,
            )
        )

    @property
    def _source(self) -> Source:
        return self._holder.source

    def close(self, *, settled: bool) -> None:
        """Leave rank 0 and free what transports made; idempotent. Rank 0 says whether its rounds are ``settled``."""
        self._lost = self._lost or "this rank closed its publisher"
        self._link.close("it closed its publisher")
        for held in self._ends.values():
            held.end.abort()
        self._pool.shutdown(wait=True)
        for held in self._ends.values():
            held.close()
        self._ends.clear()
        self.expected.clear()
        self._holder.release()

    def check_caller(self) -> None:
        """Engines are rank 0's: none of them needs a thread of this process."""

    def leave(self) -> None:
        """Leave rank 0, and nothing else."""
        self._link.close("its publisher is gone")

    # -- on the I/O thread

    def _on_message(self, message: AnyMessage) -> None:
        match message:
            case RankOrder():
                self._note(message)
            case Refused():
                self._refused = message.error.error().at(phase="join")
                self._orders.put(None)
            case Welcome():
                pass
            case _:
                self._seldom.warn(
                    "control channel: a message that is not for a trainer rank", about=type(message).__name__
                )

    def _note(self, message: RankOrder) -> None:
        try:
            order = decode_order(message.body)
        except ProtocolError as error:
            self._answer(message, Answer(error=ErrorForm.of(error)))
            return
        if message.call <= self._left and not isinstance(order, Abort | Release | Finish):
            late = StateError("this rank has left the call, as rank 0 did not come in time", hint=LATE_HINT)
            self._answer(message, Answer(error=ErrorForm.of(late)))
            return
        self._orders.put((message, order))

    def _on_lost(self, reason: str) -> None:
        self._lost = self._lost or reason
        self._orders.put(None)

    def _answer(self, message: RankOrder, answer: Answer) -> None:
        self._link.send(RankAnswer(number=message.number, body=encode(answer), failed=answer.error is not None))

    # -- collective calls: those of FirstRank, which has the arguments

    def connect(self, deadline: Deadline, wait_s: float = 0.0) -> None:
        self.join("connect", deadline)

    def add(self, engine: object, deadline: Deadline, wait_s: float = 0.0) -> Report | None:
        return self.join("add", deadline)

    def remove(self, name: str, deadline: Deadline) -> None:
        self.join("remove", deadline)

    def publish(
        self,
        deadline: Deadline,
        *,
        wake: bool,
        release: Callable[[], object] | None,
        failure: Exception | None = None,
    ) -> Report:
        """Rank 0 says whether engines are woken; ``release`` is this rank's own. ``failure``: why this rank has nothing to publish,
        which rank 0 is told."""
        self._release, self._failure = release, failure
        try:
            report = self.join("publish", deadline)
        finally:
            self._release = self._failure = None
        if report is None:
            raise ProtocolError("trainer rank 0 ended a round without a report")
        self.last_report = report
        return report

    def join(self, what: str, deadline: Deadline) -> Report | None:
        """Take part in a call of all ranks until rank 0 says how it ended: its report, or its error.

        Ends at most two seconds after the deadline, with DeadlineExceeded when rank 0 said nothing; PeerLost when it is gone.
        """
        self._call += 1
        try:
            return self._work(what, Deadline(deadline.limit_s() + GRACE_S))
        except BaseException:
            # The rest of this call is not for anybody any more.
            self._left = self._call
            raise

    def _work(self, what: str, limit: Deadline) -> Report | None:
        while True:
            message, order = self._next(what, limit)
            if isinstance(order, Abort | Release):
                self._dismiss(order)
            elif message.call < self._call:
                if not isinstance(order, Finish):
                    late = StateError("this rank has left the call already", hint=LATE_HINT)
                    self._answer(message, Answer(error=ErrorForm.of(late)))
            elif isinstance(order, Finish):
                self._call = message.call
                if (failure := order.raised()) is not None:
                    raise failure
                return Report.from_json(order.report) if order.report else None
            else:
                # A call that rank 0 made without this rank failed there.
                self._call = message.call
                self._do(what, message, order)

    def _next(self, what: str, limit: Deadline) -> _Item:
        if self._lost is None and self._refused is None:
            try:
                item = self._orders.get(timeout=limit.remaining_s())
            except queue.Empty:
                raise DeadlineExceeded(
                    f"trainer rank 0 did not end {what}() in time",
                    hint=LATE_HINT,
                ) from None
            if item is not None:
                return item
        elif not self._orders.empty():
            item = self._orders.get()
            if item is not None:
                return item
        if self._refused is not None:
            raise self._refused
        raise PeerLost(f"trainer rank 0 is gone: {self._lost}", hint=LOST_HINT)

    def _do(self, what: str, message: RankOrder, order: Answered) -> None:
        match order:
            case Connect() | Send() | Digest() | CountNonFinite():
                self._pool.submit(self._answered, message, lambda: self._beside(order))
            case _:
                self._answered(message, lambda: self._at_once(what, order))

    def _answered(self, message: RankOrder, work: Callable[[], Answer]) -> None:
        """Answer with what came of it. The broad except is on purpose: rank 0 raises it, on all ranks."""
        try:
            answer = work()
        except Exception as error:  # noqa: BLE001 - see above
            answer = Answer(error=ErrorForm.of(error))
        self._answer(message, answer)

    # -- orders

    def _at_once(self, what: str, order: AtOnce) -> Answer:
        """Orders that are quick, and those that need the caller's own thread and its current stream."""
        match order:
            case Enter():
                if order.what != what:
                    raise StateError(f"it calls {what}(), rank 0 calls {order.what}()", hint=LATE_HINT)
                if self._failure is not None:
                    raise self._failure
            case Survey():
                manifest = self._source.manifest
                facts = local_facts(self._source.device, files=self._source.memory.files)
                return Answer(manifest=manifest, layout=LayoutTable.of(self._source.layout, manifest), facts=facts)
            case Renew():
                renewed = self._holder.renew()
                if renewed:
                    self.expected.clear()
                return Answer(moved=renewed)
            case Agree():
                self._manifest = order.manifest
            case Adopt():
                moved = self._holder.adopt(order.transports)
                if moved:
                    self.expected.clear()
                return Answer(moved=moved, layout=LayoutTable.of(self._source.layout, self._manifest))
            case Expect():
                manifest = order.manifest or self._manifest
                self.expected[order.key] = ExpectedDigest(manifest, order.copies.copies(manifest), self._source.memory)
            case Keep():
                for key in self.expected.keys() - set(order.keys):
                    del self.expected[key]
            case Pair():
                return Answer(offers=self._open(order))
            case Refresh():
                self._source.deadline = Deadline(order.timeout_s)
                self._source.refresh()
            case Exhaust():
                self._source.exhaust()
            case LetGo():
                if order.always or self._release is not None:
                    self.expected.clear()
                    self._holder.let_go()
                if self._release is not None:
                    self._release()
            case _:
                assert_never(order)
        return Answer()

    def _open(self, order: Pair) -> tuple[bytes, ...]:
        transport = registry().get(order.transport)
        ends = transport.ends_of(
            len(order.pairs),
            order.copies.copies(self._manifest),
            self._source.memory,
            bucket_nbytes=order.bucket_nbytes,
            address=self._address,
            patience_s=order.patience_s,
        )
        if order.keeps:
            for end in ends:
                end.keep(self.kept, order.keeps, self._manifest)
        self._ends.update(zip(order.pairs, map(_KeptEnd, ends), strict=True))
        return tuple(end.offer() for end in ends)

    def _beside(self, order: Beside) -> Answer:
        with own_stream(self._source.device):
            match order:
                case Connect():
                    with self._held(order.pair).use() as end:
                        end.connect(Deadline(order.timeout_s))
                    return Answer()
                case Send():
                    with self._held(order.pair).use() as end:
                        return Answer(value=_sent(end, order))
                case Digest():
                    check = partial(Deadline(order.timeout_s).check, "the digest of what this rank holds")
                    return Answer(value=self._expected(order.key).of(self._source.memory, check))
                case CountNonFinite():
                    check = partial(Deadline(order.timeout_s).check, "the check of what this rank holds")
                    return Answer(counts=self._expected(order.key).non_finite(self._source.memory, check))

    def _expected(self, key: str) -> ExpectedDigest:
        expected = self.expected.get(key)
        if expected is None:
            raise ProtocolError("nothing is expected under that key")
        return expected

    def _held(self, pair: int) -> _KeptEnd:
        held = self._ends.get(pair)
        if held is None:
            raise TransportError("the pair is closed")
        return held

    def _dismiss(self, order: Abort | Release) -> None:
        held = self._ends.get(order.pair)
        if held is None:
            return
        held.end.abort()
        if isinstance(order, Release):
            del self._ends[order.pair]
            self._pool.submit(held.close)


def _sent(end: TrainerEnd, order: Send) -> int:
    deadline = Deadline(order.timeout_s)
    if order.number is None:
        end.feed(order.feeds)
        return end.send(deadline)
    return end.send_kept(order.number, deadline, changes=order.changes)


class _KeptEnd:
    """An end and who uses it: it is closed when nobody is inside any more, which an abort makes soon."""

    def __init__(self, end: TrainerEnd) -> None:
        self.end = end
        self._lock = threading.Lock()

    @contextmanager
    def use(self) -> Iterator[TrainerEnd]:
        with self._lock:
            yield self.end

    def close(self) -> None:
        with self._lock:
            self.end.close()
