"""Receiver: one worker's side of weight sync. It owns what the worker serves: version, content digest, clean or dirty."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from weightcast.commit.worker_outcome import NO_VERSION
from weightcast.control.link import JoinInfo
from weightcast.deadline import Deadline
from weightcast.digest.versions import INITIAL_VERSION, version_number
from weightcast.errors import DigestMismatch, LoadError, StateError, WeightcastError
from weightcast.logs import about
from weightcast.messages import Committed, Digested
from weightcast.receiver.base import LiveModel
from weightcast.receiver.greeting import Greeting, Identity
from weightcast.receiver.loader_area import LoadedTensors
from weightcast.receiver.place import give_back
from weightcast.receiver.session import Session
from weightcast.receiver.worker_round import Approval, Phase, RoundId, WorkerRound
from weightcast.transports.facts import local_facts

logger = logging.getLogger(__name__)

LEAVES = "the engine leaves"
WAKE_HINT = "Wake its weights up, then publish again"
APPROVAL_TIMEOUT_S = 5.0
"""A commit holds up the engine's thread, and its approval was sent before it: it comes at once or never."""


class Receiver:
    """Joins a trainer, receives rounds beside the running engine, and makes them live in ``commit``.

    ``join``, ``commit``, ``rollback`` and ``leave`` are for the thread that runs the model, between two forward passes. A call
    that raises left live weights as they were, unless ``dirty`` says otherwise. When a trainer has left, and no round of its can be
    taken back any more, what lay beside the live weights is given back on the thread of its session, between two such calls.
    """

    def __init__(self, model: LiveModel, *, rank: int = 0, world_size: int = 1, mode: str = "auto") -> None:
        self._model = model
        self._rank, self._world_size, self._mode = rank, world_size, mode
        self._round = WorkerRound()
        self._session: Session | None = None
        self._turn = threading.RLock()
        """Held by a call that works with the session, and while one that ended gives back its memory."""
        self._greeting: Greeting | None = None
        self._before: tuple[str, str, bool] | None = None
        self._loaded: LoadedTensors | None = None
        self.version = INITIAL_VERSION
        self.content = ""
        """Hex digest that the live version was published with; empty before the first sync."""
        self.dirty = False
        self.highest = 0
        """The highest version number that a commit was begun for, also where it failed or was taken back."""
        self.num_commits = 0
        self._num_bytes_before = 0

    def join(self, info: JoinInfo, world_size: int | None = None) -> None:
        """Join a trainer, whom ``greet`` may have greeted already. Raises what ``greet`` raises, and the error with which the trainer
        refuses."""
        greeting = self.greet(info, world_size)
        self._greeting = None
        with self._turn:
            self._session = Session(
                greeting, self._model, self._mode, self._round, self._serves, self._let_go, self._loaded
            )

    def greet(self, info: JoinInfo, world_size: int | None = None) -> Greeting:
        """Leave the former trainer, say hello to this one, and return at once. A second call for the same trainer returns the same
        greeting until ``join`` has used it.

        StateError when another trainer is alive and ``info.takeover`` is not set, or when the same trainer has this engine in its fleet
        under another name. ``world_size`` is the number of workers that join from now on, if it is given: some engines learn this
        number from their trainer only.
        """
        if self._greeting is not None and self._greeting.info == info:
            return self._greeting
        self._require_awake("join")
        old = self._session
        if old is not None and old.lost is None and not info.takeover and info.session != old.id:
            raise StateError(
                "another trainer publishes to this engine", phase="join", hint="Close it, or join with takeover"
            )
        if (other := self._name_with(info)) not in (None, info.engine, *info.left):
            raise StateError(
                f"{other!r} and {info.engine!r} are one engine",
                phase="join",
                hint="Give each engine once, under one name",
            )
        self.leave()
        self._world_size = world_size or self._world_size
        self._round = WorkerRound()
        self._greeting = Greeting(
            info,
            Identity(
                rank=self._rank,
                world_size=self._world_size,
                facts=local_facts(self._model.device),
                version=self.version,
                digest=self.content,
                dirty=self.dirty,
                highest=self.highest,
            ),
        )
        return self._greeting

    def _name_with(self, info: JoinInfo) -> str | None:
        """Under which name this engine has joined the trainer that asks, or is about to; None when that trainer is new."""
        greeting, session = self._greeting, self._session
        if greeting is not None and greeting.has_hope and greeting.info.session == info.session != "":
            return greeting.info.engine
        return session.engine if session is not None and session.lost is None and session.id == info.session else None

    def _serves(self) -> str | None:
        return None if self.dirty else self.content

    @property
    def num_bytes(self) -> int:
        """The bytes of weights that this worker has received from all trainers so far."""
        session = self._session
        return self._num_bytes_before + (session.pairs.num_bytes if session is not None else 0)

    @property
    def is_greeting(self) -> bool:
        """Whether a trainer was greeted whose answer ``join`` would still wait for."""
        return self._greeting is not None and not self._greeting.is_over()

    @property
    def joined(self) -> bool:
        session = self._session
        return session is not None and session.lost is None

    @property
    def has_session(self) -> bool:
        """Whether this worker has joined a trainer and not left it: the trainer is there, or rounds that it committed can still be
        taken back."""
        return self._session is not None

    def commit(self, id: RoundId, deadline: Deadline, version: str = "") -> None:
        """Make a verified round live. A second call for a committed round does nothing.

        StateError when ``version`` is given and the round was approved as another version.
        """
        with self._turn:
            self._commit(id, deadline, version)

    def _commit(self, id: RoundId, deadline: Deadline, version: str) -> None:
        session = self._require_session()
        if self._round.id == id and self._round.phase is Phase.COMMITTED:
            return
        self._require_awake("commit")
        patience = deadline.part(at_most_s=APPROVAL_TIMEOUT_S)
        approval = self._round.wait_for_approval(id, patience, version)
        self.highest = max(self.highest, version_number(approval.version))
        before = (self.version, self.content, self.dirty)
        start = time.perf_counter()
        nbytes, transfer_s = self._apply(session, id, approval, deadline)
        apply_s = time.perf_counter() - start - transfer_s
        self._before = before
        self.version, self.content, self.dirty = approval.version, approval.content, False
        self.num_commits += 1
        self._round.committed(id)
        # One line a round and engine: the workers of an engine have the same to say.
        level = logging.INFO if self._rank == 0 else logging.DEBUG
        where = about(epoch=id.epoch, round=id.round, worker=self._rank, version=self.version, phase="commit")
        line = "version %s is live: %s, applied in %.3f s (%s)"
        logger.log(level, line, self.version, session.pairs.came, apply_s, session.mode, extra=where)
        try:
            self._prove(session, id, nbytes, transfer_s, apply_s)
        except Exception as error:  # noqa: BLE001 - the commit has happened: the trainer hears that it was not proven
            session.send_failure(id, "commit", error)

    def _apply(self, session: Session, id: RoundId, approval: Approval, deadline: Deadline) -> tuple[int, float]:
        """Make the round's bytes live; what was received for that, bytes and seconds. The trainer hears what fails."""
        try:
            if session.mode == "staged":
                self._apply_staged(session, deadline)
                return 0, 0.0
            return self._apply_in_place(session, id, approval, deadline)
        except Exception as error:
            self._round.failed(id, str(error))
            session.send_failure(id, "commit", error, dirty=self.dirty)
            if isinstance(error, WeightcastError):
                # Without it a trainer in the same process takes a lost peer for an order that never arrived.
                error.at(phase="commit", worker=self._rank)
                raise
            text = f"commit failed: {type(error).__name__}: {error}"
            raise LoadError(text, phase="commit", worker=self._rank) from error

    def rollback(self, id: RoundId) -> None:
        """Return to the version before a staged round if that round was committed; in any case make sure that the round is never
        committed afterwards.

        A second call does nothing. StateError when the round is older than the present one, or is live and was received in place. When
        the way back fails half-way the worker is dirty.
        """
        with self._turn:
            self._roll_back(id)

    def _roll_back(self, id: RoundId) -> None:
        session, before = self._require_session(), self._before
        self._require_awake("rollback")
        reversible = session.mode == "staged" and before is not None
        phase = self._round.fence(id, "the trainer took it back", reversible=reversible)
        if phase is Phase.COMMITTED:
            raise StateError("only a staged round can be rolled back", phase="rollback", round=id.round)
        if phase is not Phase.ROLLING_BACK or before is None:
            return
        self.dirty = True
        try:
            session.target.swap()
            session.target.settle(Deadline(APPROVAL_TIMEOUT_S))
            session.target.take_back_loader_tensors()
            self._load_previous(session, before[0])
        except Exception as error:
            self._round.failed(id, str(error))
            raise
        self.version, self.content, self.dirty = before
        self._before = None
        self._round.rolled_back(id)

    def leave(self, reason: str = LEAVES) -> None:
        """Leave the trainer, if there is one, and free shadow and transports. A second call does nothing."""
        self._leave(reason, keeps=True)

    def _leave(self, reason: str, *, keeps: bool) -> None:
        """``keeps``: what is live through the loader can be returned to when the next trainer's round fails."""
        if self._greeting is not None:
            self._greeting.close(reason)
            self._greeting = None
        with self._turn:
            session, self._session = self._session, None
        # Not in the turn: closing waits for the session's thread, which may wait for a turn.
        self._give_up(session, reason, keeps=keeps)

    def _let_go(self, session: Session) -> None:
        """Give up a session whose trainer is gone; on the session's thread."""
        with self._turn:
            if self._session is session:
                self._session = None
                self._give_up(session, session.lost or LEAVES, keeps=True)

    def _give_up(self, session: Session | None, reason: str, *, keeps: bool) -> None:
        """Free all that a session holds beside the live weights, for others and not for torch alone."""
        self._before = None
        if session is None:
            return
        self._loaded = (session.target.loaded() or self._loaded) if keeps else None
        session.close(reason)
        self._num_bytes_before += session.pairs.num_bytes
        self._model.forget()
        if self._loaded is not None and self._model.device.type == "cuda":
            self._loaded = self._loaded.in_host_memory()
        give_back(self._model.device)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """While inside, no other thread than the engine's gives memory back."""
        with self._turn:
            yield

    def sleep(self, *, loses: bool) -> None:
        """The engine is about to unmap its weights: leave the trainer. The trainer's next round has this worker join again once the
        weights are back.

        ``loses`` says that the present weights will not come back. The worker then serves no version until a round is committed.
        """
        self._leave("the engine goes to sleep", keeps=not loses)
        if loses:
            self._loaded = None
            self.version, self.content, self.dirty = NO_VERSION, "", True

    def replaced(self, version: str) -> None:
        """Somebody else wrote the live weights: leave the trainer, whose next round has this worker join again. The worker does not
        know the content of its weights any more. Weights that were of no version stay so, because nobody says that all of them were
        written."""
        self._leave("the engine's weights were written by somebody else", keeps=False)
        self._loaded = None
        if not self.dirty:
            self.version, self.content = version, ""

    def _require_awake(self, phase: str) -> None:
        reason = self._model.why_asleep()
        if reason:
            raise StateError(f"the engine is asleep: {reason}", phase=phase, hint=WAKE_HINT)

    def _require_session(self) -> Session:
        if self._session is None:
            raise StateError("no trainer is connected", hint="Call init_weight_transfer_engine first")
        return self._session

    # -- making a round live

    def _apply_staged(self, session: Session, deadline: Deadline) -> None:
        """Live values may be those of the round, or of no version, once this raises and ``dirty`` is set; ``commit`` clears it
        with the last step, when it says which version is live."""
        target = session.target
        was_dirty = self.dirty
        try:
            target.swap()
            target.settle(deadline)
        except Exception:
            self.dirty = True  # some values may have changed places and others not
            raise
        if target.area is None:
            return
        self.dirty = True
        try:
            self._model.load_weights(target.area.tensors())
        except Exception:
            target.swap()
            self._load_previous(session, self.version)
            self.dirty = was_dirty
            raise
        target.keep_loader_tensors()

    def _load_previous(self, session: Session, version: str) -> None:
        """Bring the loader's tensors back to the version before: what was loaded last, or what the engine started with.

        StateError when nobody has them any more, as after an in-place round or a change of the model's form.
        """
        if not session.layout.through_loader:
            return
        area = session.target.area
        previous = None if area is None else area.live_tensors()
        if previous is not None:
            self._model.load_weights(previous)
        elif version == INITIAL_VERSION:
            self._model.load_initial()
        else:
            raise StateError("nobody has the former values of the tensors that go through the loader", phase="commit")

    def _apply_in_place(
        self, session: Session, id: RoundId, approval: Approval, deadline: Deadline
    ) -> tuple[int, float]:
        memory = session.target.memory()
        before = (self.dirty, self._loaded)
        self.dirty, self._loaded = True, None
        try:
            nbytes, transfer_s, digest = session.receive(id, memory, deadline)
        except Exception:
            if not session.pairs.has_written:
                self.dirty, self._loaded = before
            raise
        session.hold(id, memory, digest)
        self._check_digest(session, approval)
        self._model.refresh()
        session.target.process_in_place()
        if session.target.area is not None:
            self._model.load_weights(session.target.area.tensors())
        session.target.settle(deadline)
        return nbytes, transfer_s

    @staticmethod
    def _check_digest(session: Session, approval: Approval) -> None:
        digest = session.proven_digest
        if digest != approval.digest:
            raise DigestMismatch(
                f"live weights have digest {digest:016x}, published were {approval.digest:016x}", phase="commit"
            )

    def _prove(self, session: Session, id: RoundId, nbytes: int, transfer_s: float, apply_s: float) -> None:
        """Report the digest of what is live.

        Storages that were verified in the shadow and became live as they are, or were digested in place by the commit
        itself, need no second look. Otherwise the live bytes are digested after the engine went on: parameters change
        only on its thread between steps, so that is no race.
        """
        target = session.target
        if target.moves or not target.staged:
            self._report(session, id, session.proven_digest, session.digested, nbytes, transfer_s, apply_s, 0.0)
            return
        landed = target.landed_digest()
        if landed is not None:
            self._report(session, id, landed, "all", nbytes, transfer_s, apply_s, 0.0)
            return
        memory = target.live_memory()

        def prove() -> None:
            start = time.perf_counter()
            digest = session.digest_of(memory)
            self._report(session, id, digest, "all", nbytes, transfer_s, apply_s, time.perf_counter() - start)

        session.run_later(prove)

    @staticmethod
    def _report(
        session: Session,
        id: RoundId,
        digest: int,
        digested: Digested,
        nbytes: int,
        transfer_s: float,
        apply_s: float,
        digest_s: float,
    ) -> None:
        session.send(
            Committed(
                epoch=id.epoch,
                round=id.round,
                digest=digest,
                digested=digested,
                nbytes=nbytes,
                transfer_s=transfer_s,
                apply_s=apply_s,
                digest_s=digest_s,
            )
        )
