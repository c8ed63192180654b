"""Receiver: one worker's side of weight sync. It owns what the worker serves: version, content digest, clean or dirty."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import torch

from weightcast.control.link import JoinInfo
from weightcast.deadline import Deadline
from weightcast.errors import DigestMismatch, LoadError, StateError, WeightcastError
from weightcast.memory import Memory
from weightcast.messages import Committed
from weightcast.receiver.base import LiveModel
from weightcast.receiver.session import Identity, Session
from weightcast.round import Approval, Phase, RoundId, WorkerRound
from weightcast.transports.facts import local_facts

logger = logging.getLogger(__name__)

Tensors = Iterator[tuple[str, torch.Tensor]]


class Receiver:
    """Joins a trainer, receives rounds beside the running engine, and makes them live in ``commit``.

    ``join``, ``commit``, ``rollback`` and ``leave`` are for the thread that runs the model, between two forward passes. A call
    that raises left live weights as they were, unless ``dirty`` says otherwise.
    """

    def __init__(self, model: LiveModel, *, rank: int = 0, world_size: int = 1, mode: str = "auto") -> None:
        self._model = model
        self._rank, self._world_size, self._mode = rank, world_size, mode
        self._round = WorkerRound()
        self._session: Session | None = None
        self._before: tuple[str, str] | None = None
        self.version = "default"
        self.content = ""
        """Hex digest that the live version was published with; empty before the first sync."""
        self.dirty = False
        self.num_commits = 0

    def join(self, info: JoinInfo) -> None:
        """Join a trainer. StateError when another one is alive and ``info.takeover`` is not set."""
        old = self._session
        if old is not None and old.lost is None and not info.takeover:
            raise StateError(
                "another trainer publishes to this engine", phase="join", hint="Close it, or join with takeover"
            )
        self.leave()
        self._round = WorkerRound()
        identity = Identity(
            rank=self._rank,
            world_size=self._world_size,
            facts=local_facts(self._model.device),
            version=self.version,
            digest=self.content,
            dirty=self.dirty,
        )
        self._session = Session(info, self._model, identity, self._mode, self._round)

    @property
    def joined(self) -> bool:
        return self._session is not None and self._session.lost is None

    def commit(self, id: RoundId, deadline: Deadline) -> None:
        """Make a verified round live. Repeating the call for a committed round does nothing."""
        session = self._require_session()
        if self._round.id == id and self._round.phase is Phase.COMMITTED:
            return
        approval = self._round.wait_for_approval(id, deadline)
        before = (self.version, self.content)
        start = time.perf_counter()
        try:
            if session.mode == "staged":
                self._apply_staged(session)
                nbytes, transfer_s = 0, 0.0
            else:
                nbytes, transfer_s = self._apply_in_place(session, approval, deadline)
        except Exception as error:
            self._round.abort(id, str(error))
            session.send_failure(id, "commit", error, dirty=self.dirty)
            if isinstance(error, WeightcastError):
                raise
            raise LoadError(f"commit failed: {type(error).__name__}: {error}", phase="commit") from error
        apply_s = time.perf_counter() - start - transfer_s
        self._before = before
        self.version, self.content, self.dirty = approval.version, approval.content, False
        self.num_commits += 1
        self._round.committed(id)
        self._prove(session, id, nbytes, transfer_s, apply_s)

    def rollback(self, id: RoundId) -> None:
        """Return to the version before a committed staged round. StateError when that is not possible."""
        session = self._require_session()
        if session.mode != "staged" or self._before is None:
            raise StateError("only a staged round can be rolled back", phase="rollback", round=id.round)
        if not self._round.rolled_back(id):
            raise StateError(f"round {id.epoch}.{id.round} is not the committed one", phase="rollback", round=id.round)
        self.dirty = True
        session.target.swap()
        self._load_previous(session)
        self.version, self.content = self._before
        self.dirty, self._before = False, None

    def leave(self) -> None:
        """Leave the trainer, if any, and free shadow and transports; idempotent."""
        if self._session is not None:
            self._session.close()
            self._session = None
        self._before = None

    def _require_session(self) -> Session:
        if self._session is None:
            raise StateError("no trainer is connected", hint="Call init_weight_transfer_engine first")
        return self._session

    # -- making a round live

    def _apply_staged(self, session: Session) -> None:
        target = session.target
        target.swap()
        if not session.layout.through_loader:
            return
        was_dirty, self.dirty = self.dirty, True
        try:
            self._model.load_weights(target.loader_tensors())
        except Exception:
            target.swap()
            self._load_previous(session)
            self.dirty = was_dirty
            raise
        self.dirty = False
        target.keep_loader_tensors()

    def _load_previous(self, session: Session) -> None:
        """Bring the loader's tensors back to the version before; from the start of the engine if there was none."""
        if not session.layout.through_loader:
            return
        previous = session.target.previous_loader_tensors()
        if previous is None:
            self._model.load_initial()
        else:
            self._model.load_weights(previous)

    def _apply_in_place(self, session: Session, approval: Approval, deadline: Deadline) -> tuple[int, float]:
        memory = session.target.memory()
        self.dirty = True
        nbytes, transfer_s = session.receive(memory, deadline)
        self._check_digest(session, memory, approval)
        if session.layout.through_loader:
            self._model.load_weights(session.target.loader_tensors())
        return nbytes, transfer_s

    @staticmethod
    def _check_digest(session: Session, memory: Memory, approval: Approval) -> None:
        digest = session.proven_digest = session.digest_of(memory)
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
            self._report(session, id, session.proven_digest, nbytes, transfer_s, apply_s, 0.0)
            return
        memory = target.live_memory()

        def prove() -> None:
            start = time.perf_counter()
            digest = session.digest_of(memory)
            self._report(session, id, digest, nbytes, transfer_s, apply_s, time.perf_counter() - start)

        session.run_later(prove)

    @staticmethod
    def _report(
        session: Session, id: RoundId, digest: int, nbytes: int, transfer_s: float, apply_s: float, digest_s: float
    ) -> None:
        session.send(
            Committed(
                epoch=id.epoch,
                round=id.round,
                digest=digest,
                nbytes=nbytes,
                transfer_s=transfer_s,
                apply_s=apply_s,
                digest_s=digest_s,
            )
        )
