"""Session: a worker's stay with one trainer, from the first message until either side leaves.

The I/O thread of the control link only notes what came. Setting up an epoch and receiving staged bytes happen on the session's
own thread, so the engine keeps generating; live parameters are touched only by ``Receiver.commit``.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence

import msgspec

from weightcast.at_exit import at_exit
from weightcast.content.layout_digest import LayoutDigest
from weightcast.cuda.wait import own_stream, wait_stream
from weightcast.deadline import Deadline
from weightcast.errors import (
    BaseMismatch,
    ErrorForm,
    StateError,
    TransportError,
    WeightcastError,
)
from weightcast.layout import Layout
from weightcast.layout.memory import Memory
from weightcast.layout.table import LayoutTable
from weightcast.logs import about
from weightcast.messages import (
    Abort,
    AnyMessage,
    Begin,
    Digested,
    Failed,
    Filled,
    Landings,
    LetGo,
    Message,
    Ready,
    Setup,
    Staged,
    Verified,
    Welcome,
)
from weightcast.plan import Holdings, compile_plan
from weightcast.receiver.base import LiveModel
from weightcast.receiver.greeting import Greeting
from weightcast.receiver.loader_area import LoadedTensors, with_area
from weightcast.receiver.pairs import RELEASE_TIMEOUT_S, Changes, Pairs
from weightcast.receiver.staging import Held, make_target
from weightcast.receiver.worker_round import Approval, Phase, RoundId, WorkerRound
from weightcast.transports.base import WorkerEnd
from weightcast.untrusted.seldom import Seldom

logger = logging.getLogger(__name__)

FULL_EVERY = 10
"""Rounds of changes in a row after which all bytes of a memory are read again for its digest."""
WAY_BACK_S = 5.0
"""A trainer takes back at most two seconds after its round's deadline, and its order may wait for the engine."""


class Session:
    """One trainer's channel, plan, transports and target memory. ``lost`` says why it ended, None while it lives."""

    def __init__(
        self,
        greeting: Greeting,
        model: LiveModel,
        mode: str,
        round: WorkerRound,
        serves: Callable[[], str | None],
        ended: Callable[[Session], None],
        loaded: LoadedTensors | None = None,
    ) -> None:
        """``serves`` returns the digest of the content that is live now, or None for weights of no version. ``ended`` is called on the
        session's thread once the trainer is gone and can take no round back any more."""
        self._model = model
        self._mode_wish = mode
        self.round = round
        self.engine = greeting.info.engine
        """The name by which the trainer knows this engine."""
        self.lost: str | None = None
        self.proven_digest = 0
        """Digest of what this round's transfer left in its target memory."""
        self.link = greeting.link
        self.pairs = Pairs(model.device, round, self.send, self._why_gone)
        self._serves, self._ended = serves, ended
        self._loaded = loaded
        self._seldom = Seldom(logger)
        self._changes: tuple[RoundId, Changes] | None = None
        """The last round that was begun as one of changes, and against what these are told."""
        self._received: tuple[RoundId | None, RoundId | None] = None, None
        """The last round of which everything came, and the one before."""
        self._since = 0
        """Rounds since all bytes were read of the memory that the present round writes."""
        self._epoch = 0
        self._leaving = threading.Event()
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="weightcast-receiver", daemon=True)
        try:
            self._join(greeting.welcome(), Deadline(greeting.info.timeout_s))
        except BaseException:
            self.link.close("could not join")
            raise
        self._stay_at_exit = at_exit(lambda: self._end_thread("the process ends"))
        self._thread.start()
        greeting.hand_over(self._on_message, self._on_lost)

    # -- joining, on the engine's thread

    def _join(self, answer: Welcome, deadline: Deadline) -> None:
        self.manifest = answer.manifest
        self.id = answer.session
        self._model.keep(answer.keep)
        layout = self._model.layout(self.manifest)
        layout.check(self.manifest)
        self.layout: Layout = with_area(layout, self.manifest)
        # The engine's own wish counts before the trainer's.
        wish = self._mode_wish if self._mode_wish != "auto" else answer.mode
        self.mode, self.target = make_target(
            self._model, self.manifest, self.layout, wish, answer.shadows, self._loaded, deadline
        )
        self._digest = LayoutDigest(self.manifest, self.layout, gaps_are_zero=self.target.memory().is_arena)
        shadow_nbytes, place = self.target.shadow_nbytes, self.target.place
        where = str(place or self._model.device) if shadow_nbytes else ""
        logger.info("weights come %s; %d bytes beside them (%s)", self.mode, shadow_nbytes, where or "nowhere")
        self._landings = LayoutTable.of(self.layout, self.manifest)
        self.link.send(Landings(layout=self._landings, mode=self.mode, shadow_nbytes=shadow_nbytes, shadow=where))

    # -- on the I/O thread

    def _on_message(self, message: AnyMessage) -> None:
        match message:
            case Setup():
                self._begin_epoch(message.epoch, lambda: self._set_up(message))
            case LetGo():
                self._begin_epoch(message.epoch, lambda: self._let_go(message))
            case Begin():
                self._open(message)
            case Verified():
                approval = Approval(version=message.version, content=message.content, digest=message.digest)
                self.round.verified(RoundId(epoch=message.epoch, round=message.round), approval)
            case Filled():
                self.pairs.windows.note(RoundId(epoch=message.epoch, round=message.round), message.window)
            case Abort():
                id = RoundId(epoch=message.epoch, round=message.round)
                self.round.abort(id, message.reason)
                if id == self.round.id and self.round.stops(id):
                    self.pairs.abort()
            case _:
                self._seldom.warn("control channel: a message that is not for a worker", about=type(message).__name__)

    def _begin_epoch(self, epoch: int, begin: Callable[[], None]) -> None:
        if epoch <= self._epoch:
            if self._seldom.is_due("epoch"):
                logger.info("epoch %d is stale, the present one is %d", epoch, self._epoch)
            return
        self._epoch = epoch
        self.round.abort_any("the trainer began another epoch")
        self.pairs.abort()
        self._tasks.put(begin)

    def _open(self, begin: Begin) -> None:
        # Here and not with the transfer: an approval may follow before the session's thread gets to it.
        id = RoundId(epoch=begin.epoch, round=begin.round)
        if self.round.id < id and begin.base not in (None, self._serves()):
            self._refuse_base(id, begin.base)
        elif self.round.begin(id, Deadline(begin.timeout_s)):
            if begin.changes:
                self._changes = (id, Changes.SINCE_THE_LAST)
            if self.mode == "staged":
                self._tasks.put(lambda: self._stage(begin))
        elif self.round.id < id:
            error = StateError(
                f"round {self.round.id} is still {self.round.phase.value}", hint="Publish again when that is done"
            )
            self.send_failure(id, "begin", error)
        else:
            if self._seldom.is_due("round"):
                logger.info("round %s is stale, the present one is %s", id, self.round.id)

    def _refuse_base(self, id: RoundId, base: str | None) -> None:
        """The trainer is mistaken in what is live here. The round is over before it began, so that an order to commit it is told so."""
        serves = self._serves()
        what = "weights of no version" if serves is None else f"content {serves or '(never published)'}"
        error: StateError = BaseMismatch(
            f"this worker serves {what}, the round builds on {base or '(never published)'}"
        )
        try:
            self.round.fence(id, error.message)
        except StateError as busy:
            error = busy
        self.send_failure(id, "begin", error)

    def _on_lost(self, reason: str) -> None:
        self.lost = reason
        self.round.abort_any(reason)
        # A commit that pulls can end without the trainer: its memory stays mapped, and the digest proves what came.
        if self.round.phase is not Phase.COMMITTING or self.pairs.needs_trainer:
            self.pairs.abort()
        self._tasks.put(None)
        level = logging.INFO if self.link.said_goodbye else logging.WARNING
        logger.log(level, "%s; this engine goes on with what it serves", reason)

    def _why_gone(self, needs_trainer: bool) -> str | None:
        """Why this worker receives nothing more."""
        if self._leaving.is_set() or (self.lost is not None and needs_trainer):
            return self.lost or "this worker leaves"
        return None

    # -- on the session's thread

    def _work(self) -> None:
        """The broad except is on purpose: a task that fails unforeseen must not end the thread, which would leave a
        worker that is alive and never answers."""
        with own_stream(self._model.device):
            while (task := self._tasks.get()) is not None:
                try:
                    task()
                except Exception as error:  # noqa: BLE001 - see above
                    self.send_failure(self.round.id, "worker", error)
            self.pairs.close()
            if self._is_settled():
                try:
                    if self._model.device.type == "cuda":
                        wait_stream(self._model.device, Deadline(RELEASE_TIMEOUT_S), "what is left of the last round")
                    self._ended(self)
                except Exception:
                    logger.exception(
                        "what lay beside the weights was not given back; it is when the next trainer joins"
                    )
        self._stay_at_exit()

    def _is_settled(self) -> bool:
        """Wait until no order can come any more to take the last round back; False when this worker leaves before.

        Who does not say goodbye may be a trainer that only its connection was lost of, and that still calls the engine.
        """
        if not self.link.settled and self.round.id.round:
            return not self._leaving.wait(self.round.may_return_s() + WAY_BACK_S)
        return not self._leaving.is_set()

    def _leave_epoch(self, epoch: int, leave: Callable[[], bool]) -> bool:
        """Leave the pairs of earlier epochs; False, and the trainer is told, where one of them is still in use."""
        if leave():
            return True
        error = TransportError("a transfer of an earlier epoch does not end", hint="Restart the engine if it stays")
        self.send_failure(RoundId(epoch=epoch, round=0), "setup", error)
        return False

    def _let_go(self, order: LetGo) -> None:
        if self._leave_epoch(order.epoch, self.pairs.close):
            self.link.send(Ready(epoch=order.epoch, plan_digest=""))

    def _set_up(self, setup: Setup) -> None:
        if not self._leave_epoch(setup.epoch, self.pairs.retire):
            return
        try:
            plan = compile_plan(self.manifest, Holdings.told(self.manifest, setup.holdings), self._landings)
            deadline = Deadline(setup.timeout_s)
            self.pairs.set_up(setup, plan, deadline, lambda ends: self._warm_up(ends, deadline))
            self.link.send(Ready(epoch=setup.epoch, plan_digest=plan.digest))
        except Exception as error:  # noqa: BLE001 - the trainer is told by name; an exception here would only end this thread
            self.pairs.close()
            self.send_failure(RoundId(epoch=setup.epoch, round=0), "setup", error)

    def _warm_up(self, ends: Sequence[WorkerEnd], deadline: Deadline) -> None:
        """Compile for the next round what it needs: an in-place round, or the commit of a staged one, would do it while the engine
        waits."""
        memory = self.target.known_memory
        for end in ends:
            end.warm_up(memory, self.manifest)
        self._digest.warm_up(memory)
        self.target.compile()
        if self._model.device.type == "cuda":
            # Rounds use the tables on streams of their own.
            wait_stream(self._model.device, deadline, "getting ready for a round")

    def _stage(self, begin: Begin) -> None:
        id = RoundId(epoch=begin.epoch, round=begin.round)
        try:
            asleep = self._model.why_asleep()
            if asleep:
                raise StateError(f"the engine is asleep: {asleep}", hint="Wake its weights up, then publish again")
            self.target.renew()
            memory = self.target.memory()
            deadline = Deadline(begin.timeout_s)
            start = time.perf_counter()
            if begin.changes:
                self._changes = (id, self._catch_up())
            catch_up_s = time.perf_counter() - start
            nbytes, transfer_s, digest = self.receive(id, memory, deadline)
            self._received = (id, self._received[0])
            transfer_s += catch_up_s
            start = time.perf_counter()
            self.hold(id, memory, digest)
            digest_s = time.perf_counter() - start
            self.target.warm_up(deadline)
            if self.round.staged(id):
                self._send_staged(id, nbytes, transfer_s, digest_s)
        except Exception as error:  # noqa: BLE001 - as above: whatever fails here is the trainer's to know
            if self.round.abort(id, str(error)):
                self.send_failure(id, "transfer", error)

    def _catch_up(self) -> Changes:
        """Have the shadow hold what the last round brought, or let the last round's changes be repeated there."""
        last, before = self._received
        held = None if self.target.holds is None else self.target.holds.round
        if before is not None and held == before and self.pairs.can_repeat:
            return Changes.SINCE_THE_ONE_BEFORE
        if last is None or held != last:
            self.target.catch_up()
        return Changes.SINCE_THE_LAST

    def _send_staged(self, id: RoundId, nbytes: int, transfer_s: float, digest_s: float) -> None:
        rate = nbytes / max(transfer_s, 1e-9) / 1e9
        where = about(epoch=id.epoch, round=id.round, phase="transfer")
        logger.debug("round %s staged: %d bytes in %.3f s, %.2f GB/s", id, nbytes, transfer_s, rate, extra=where)
        self.link.send(
            Staged(
                epoch=id.epoch,
                round=id.round,
                digest=self.proven_digest,
                digested=self.digested,
                nbytes=nbytes,
                transfer_s=transfer_s,
                digest_s=digest_s,
            )
        )

    # -- shared with the Receiver

    def receive(self, id: RoundId, memory: Memory, deadline: Deadline) -> tuple[int, float, int | None]:
        """Receive a round from all trainer ranks at once. Returns the bytes, the seconds, and the digest of what landed, which is None
        where the transports take no digest. StateError once the round is over."""
        began, changes = self._changes or (None, Changes.NONE)
        changes = changes if began == id else Changes.NONE
        held, self.target.holds = self.target.holds, None
        self._since = 0
        base = None
        if held is not None and changes is not Changes.NONE:
            self._since = held.since + (2 if changes is Changes.SINCE_THE_ONE_BEFORE else 1)
            base = held.digest if self._since <= FULL_EVERY else None
        return self.pairs.receive(id, memory, self.manifest, deadline, changes, base)

    def hold(self, id: RoundId, memory: Memory, digest: int | None) -> None:
        """All of a round is in the memory: note its digest, and take that of all bytes there where receiving has not told it."""
        if digest is None:
            digest, self._since = self.digest_of(memory), 0
        self.proven_digest = digest
        self.target.holds = Held(id, digest, self._since)

    @property
    def digested(self) -> Digested:
        """Of which bytes the last round's digest was taken: of all, or of what changed since a digest of all."""
        return "changed" if self._since else "all"

    def digest_of(self, memory: Memory) -> int:
        """Return the digest of all landings in a memory of this session's layout."""
        return self._digest.of(memory)

    def run_later(self, task: Callable[[], None]) -> None:
        """Queue work for the session's thread."""
        self._tasks.put(task)

    def send(self, message: Message) -> None:
        self.link.send(message)

    def send_failure(self, id: RoundId, phase: str, error: BaseException, *, dirty: bool = False) -> None:
        """Tell the trainer of an error by its class. An error of another library travels with its class in the text."""
        form = msgspec.structs.replace(ErrorForm.of(error, otherwise=TransportError), phase=phase)
        level = logging.INFO if isinstance(error, WeightcastError) else logging.ERROR
        where = about(epoch=id.epoch, round=id.round, phase=phase)
        trace = level >= logging.ERROR
        logger.log(level, "round %s failed in %s: %s", id, phase, form.message, exc_info=trace, extra=where)
        self.send(Failed(epoch=id.epoch, round=id.round, error=form, dirty=dirty))

    def close(self, reason: str = "the engine leaves") -> None:
        """Leave the trainer and free transports and shadow. A second call does nothing. May be called on the session's own thread."""
        has_ended = self._end_thread(reason)
        self.pairs.close()
        if has_ended:
            # Now, and not when the garbage collector comes by: the next trainer's shadow needs the room.
            self.target.close()
            self._digest.forget()

    def _end_thread(self, reason: str) -> bool:
        """Leave the trainer; whether nothing runs on the session's thread any more but this."""
        self.lost = self.lost or reason
        self.round.abort_any(reason)
        self._leaving.set()
        self.pairs.abort()
        self.link.close(reason)
        self._tasks.put(None)
        if threading.current_thread() is self._thread:
            return True
        self._thread.join(5.0)
        return not self._thread.is_alive()
