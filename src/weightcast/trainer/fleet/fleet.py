"""The fleet: engines of one publisher, their workers, and what rounds expect of them. ``set_up`` connects them for an epoch."""

from __future__ import annotations

import logging
import secrets
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from weightcast.content.expected import ExpectedDigest
from weightcast.control.coordinator import Coordinator, Member
from weightcast.deadline import Deadline
from weightcast.errors import (
    DeadlineExceeded,
    PeerLost,
    StateError,
    WeightcastError,
)
from weightcast.layout import image_layout, most_placements
from weightcast.layout.table import LayoutTable
from weightcast.manifest import Manifest
from weightcast.manifest.names import shown
from weightcast.messages import MAX_FRAME_NBYTES, Landings, Welcome
from weightcast.plan import Holdings, Plan, compile_plan
from weightcast.sources.base import Source
from weightcast.sources.holder import Holder
from weightcast.trainer.fleet.choice import Choice
from weightcast.trainer.fleet.groups import groups_of, mates_of
from weightcast.trainer.fleet.link import EngineLink, WorkerLink
from weightcast.trainer.fleet.places import Places, places_of
from weightcast.trainer.fleet.ties import Ties
from weightcast.trainer.progress import Progress
from weightcast.trainer.ranks import Ranks
from weightcast.trainer.ranks.shared_digest import SharedDigest
from weightcast.trainer.settings import Settings
from weightcast.transports.kept import Kept

logger = logging.getLogger(__name__)

MAX_LEFT = 64
"""How many dismissed engines are told of: those before them have heard of their dismissal."""


PLACEMENT_NBYTES = 512
"""More than what one placement takes in a message, long names included."""


class Fleet:
    """All engines of one Publisher, their plans and pairs. Not thread-safe: one call at a time."""

    def __init__(self, holder: Holder, coordinator: Coordinator, settings: Settings, ranks: Ranks) -> None:
        self._holder = holder
        self.ranks = ranks
        self.coordinator = coordinator
        self.settings = settings
        self._session = secrets.token_hex(8)
        self._left: deque[str] = deque(maxlen=MAX_LEFT)
        self.engines: list[EngineLink] = []
        self.epoch = 0
        self.number_used = 0
        """The highest version number that this trainer has used or found in its log."""
        self.expected: dict[str, ExpectedDigest | SharedDigest] = {}
        self._content_key: str | None = None
        self.ties = Ties(ranks)
        self.kept = Kept()
        """What this rank sent last, for rounds that send changes."""
        self._places: tuple[Holdings | None, dict[tuple[LayoutTable, ...], Places]] = None, {}
        """By the layouts of an engine's workers, for the holdings that were seen last."""
        self.progress = Progress(settings.on_progress)
        self.wait_s = 0.0
        """How long an engine may take to be there at all before it joins."""
        self.choice = Choice(ranks, None if settings.transport == "auto" else settings.transport)
        coordinator.greet_with(self._welcome)

    @property
    def source(self) -> Source:
        """What is published, on this rank."""
        return self._holder.source

    @contextmanager
    def waiting(self, wait_s: float) -> Iterator[None]:
        """While inside, engines that join are given so many seconds to be there at all."""
        self.wait_s = wait_s
        try:
            yield
        finally:
            self.wait_s = 0.0

    def _welcome(self, member: Member) -> Welcome:
        self.progress("record", member.engine)
        return Welcome(
            session=self._session,
            manifest=self.ranks.manifest,
            mode=self.settings.mode,
            shadows=self.settings.shadows,
            keep=tuple(self.settings.keep),
        )

    def take_up(self, *, is_other_form: bool) -> None:
        """The source is another one now: engines have to be set up again, and join again where its manifest is another one."""
        self._forget_memory()
        for engine in self.engines:
            for worker in engine.workers:
                worker.close_end()
            if is_other_form:
                engine.joined, engine.broken = False, "the source has another form"
            elif engine.broken is None:
                engine.broken = "the source was made anew"

    def let_go(self) -> None:
        """Refer to nothing of the source's memory until it is looked at anew. For engines that have left."""
        self._forget_memory()
        self._holder.let_go()

    def _forget_memory(self) -> None:
        """What was compiled for the source's memory is of no use any more."""
        self.expected.clear()
        self.ties.forget()

    # -- admission

    def admit(self, engine: EngineLink, deadline: Deadline) -> None:
        """Have all workers of an engine join; raises the error that stopped it, with the engine's name.

        May run beside rounds of other engines: it touches nothing but this one.
        """
        try:
            self._admit(engine, deadline)
        except WeightcastError as error:
            engine.broken = str(error)
            self._close_workers(engine, "it could not join")
            error.at(engine=engine.name, phase="join")
            raise

    def _admit(self, engine: EngineLink, deadline: Deadline) -> None:
        engine.joined = False
        self._close_workers(engine, "it joins again")
        if self.wait_s:
            self.progress("wait", engine.name)
            engine.client.wait_until_there(deadline.part(at_most_s=self.wait_s))
        self.progress("connect", engine.name)
        world_size = engine.client.world_size(deadline)
        invitation = self._invitation(engine, world_size, deadline)
        self.progress("join", engine.name)
        engine.client.init(invitation, deadline)
        workers = [
            self._worker(member, deadline)
            for member in self.coordinator.wait_members(engine.name, world_size, deadline)
        ]
        engine.places = self._places_of(tuple(dict.fromkeys(worker.landings.layout for worker in workers)))
        others = [other.highest for other in self.engines if other is not engine]
        engine.greet(workers, max([self.number_used, engine.highest, *others]))
        self.progress("joined", engine.name)
        _log_joined(engine)

    def _invitation(self, engine: EngineLink, world_size: int, deadline: Deadline) -> dict[str, Any]:
        """The ``init_info`` with which an engine's workers reach this trainer. Its ticket admits each worker once."""
        ticket = self.coordinator.issue_ticket(
            engine.name, world_size, large_nbytes=landings_nbytes(self.ranks.manifest)
        )
        return {
            "address": f"tcp://{self.settings.reached_at}:{self.coordinator.port}",
            "public_key": self.coordinator.public_key,
            "ticket": ticket,
            "engine": engine.name,
            "timeout_s": deadline.limit_s(),
            "silence_s": self.coordinator.silence_s,
            "takeover": self.settings.takeover and not engine.was_here,
            "session": self._session,
            "left": list(self._left),
            "world_size": world_size,
            **({"adapter": self.settings.adapter} if self.settings.adapter else {}),
        }

    def _worker(self, member: Member, deadline: Deadline) -> WorkerLink:
        """A worker that was admitted, once it has said where tensors land."""
        landings = self.coordinator.take(member, Landings, deadline, phase="join")
        assert isinstance(landings, Landings)
        landings.layout.check_landings(self.ranks.manifest)
        return WorkerLink(member, landings)

    def _places_of(self, tables: tuple[LayoutTable, ...]) -> Places:
        """The places of an engine whose workers have these layouts; looked for once for all engines with the same ones."""
        holdings, (seen, known) = self.ranks.holdings, self._places
        if holdings is not seen:
            known = {}
            self._places = holdings, known
        if tables not in known:
            layouts = [table.layout(holdings.manifest) for table in tables]
            known[tables] = places_of(holdings.manifest, holdings, layouts, self.settings.unused)
        return known[tables]

    def probe(self, engines: Iterable[EngineLink]) -> None:
        """Notice workers of these engines whose connection has closed."""
        self.coordinator.probe(worker.member for engine in engines for worker in engine.workers)

    # -- an epoch

    def begin_epoch(self, engines: Sequence[EngineLink]) -> None:
        """What was sent in earlier epochs counts no more. Engines that shared pairs with these have to be set up again, too."""
        self.epoch = self.coordinator.epoch = self.epoch + 1
        names = {engine.name for engine in engines}
        for engine in self.engines:
            if engine.name not in names and engine.mates & names and engine.broken is None:
                engine.broken = "an engine that shared its transfers was set up again"

    def regroup(self, engines: Sequence[EngineLink]) -> None:
        """Mark engines as broken whose pairs are not shared as rounds of exactly these engines need it."""
        present = [engine for engine in engines if engine.joined and engine.broken is None]
        mates = mates_of(groups_of(present, share=self.settings.shares))
        for engine in present:
            if engine.mates != mates[engine.name]:
                engine.broken = "its transfers are shared with other engines than those of the round"

    def adopt(
        self, transports: Iterable[str], engines: Sequence[EngineLink], deadline: Deadline
    ) -> dict[str, WeightcastError]:
        """Let each transport make the memory of all ranks reachable, once; returns errors by transport. A moved memory is the
        source's from then on, and engines beside these, whose pairs read the former one, have to be set up again."""
        before, moved = self.source.memory, False
        errors: dict[str, WeightcastError] = {}
        for name in transports:
            try:
                self._holder.adopt([name])
                moved = self.ranks.adopt([name], deadline) or moved
            except (PeerLost, DeadlineExceeded, StateError):
                raise
            except WeightcastError as error:
                errors[name] = error
        if moved or self.source.memory is not before:
            self._forget_memory()
            for engine in self.engines:
                if engine not in engines and engine.broken is None:
                    engine.broken = "the source's memory moved"
        return errors

    def expect(self, key: str, plan: Plan, deadline: Deadline) -> ExpectedDigest | SharedDigest:
        """The digest of what this plan brings, made once for each key."""
        if key not in self.expected:
            self.expected[key] = self.ranks.expected(key, plan, deadline)
        return self.expected[key]

    def content(self, deadline: Deadline) -> ExpectedDigest | SharedDigest:
        """The digest of all that is published; shared with workers that want exactly that."""
        if self._content_key is None or self._content_key not in self.expected:
            plan = self._whole_plan()
            self._content_key = plan.key
            self.expect(self._content_key, plan, deadline)
        return self.expected[self._content_key]

    def _whole_plan(self) -> Plan:
        """Copies that stand for everything that is published, each value once, however many ranks hold it."""
        manifest = self.ranks.manifest
        return compile_plan(manifest, self.ranks.holdings, image_layout(manifest))

    # -- leaving

    def _close_workers(self, engine: EngineLink, reason: str, *, settled: bool = True) -> None:
        """Also those who joined and whom an admission that failed did not count. ``settled``: the engine is in no round."""
        # First: where an exception of a signal handler comes in between, the engine joins again.
        engine.joined, engine.broken = False, engine.broken or reason
        for worker in engine.workers:
            worker.close_end()
        self.coordinator.forget_engine(engine.name, reason, settled=settled)
        engine.workers = []

    def has_left(self, engine: EngineLink) -> None:
        """An engine was asked to leave, and did: it joins again before its next round."""
        self._close_workers(engine, "it has left")
        engine.joined, engine.broken = False, "it left after its last round, and joins again for the next one"

    def remove(self, engine: EngineLink, *, settled: bool = True) -> None:
        """Dismiss an engine; it goes on with what it serves. ``settled``: it is in no round."""
        self.engines.remove(engine)
        self._left.append(engine.name)
        self._close_workers(engine, "it closed the publisher, or dismissed this engine", settled=settled)
        engine.client.close()
        self.forget_unneeded()

    def forget_unneeded(self) -> None:
        """Expect no digests any more that only workers needed who have left, on all ranks: each costs a look at all values."""
        needed = {worker.digest_key for engine in self.engines for worker in engine.workers} | {self._content_key}
        for key in self.expected.keys() - needed:
            del self.expected[key]
        ties = {tie for engine in self.engines for tie in self.ties.doubtful(engine)}
        self.ranks.keep_expected([*self.expected, *self.ties.keep(ties)])

    def find(self, name: str) -> EngineLink:
        """The engine of that name; StateError lists the fleet when there is none."""
        for engine in self.engines:
            if engine.name == name.rstrip("/"):
                return engine
        raise StateError(f"{name!r} is not in the fleet", hint=f"Engines: {', '.join(e.name for e in self.engines)}")

    def close(self, *, settled: bool) -> None:
        """Dismiss all engines and free all transports; idempotent. ``settled``: no round runs."""
        for engine in list(self.engines):
            self.remove(engine, settled=settled)
        self._forget_memory()
        self._holder.release()


def landings_nbytes(manifest: Manifest) -> int:
    """How long a worker's landings may be as a message."""
    return min(MAX_FRAME_NBYTES, most_placements(manifest) * PLACEMENT_NBYTES)


def _log_joined(engine: EngineLink) -> None:
    if engine.places.unused:
        left_out = engine.places.unused
        logger.info("%s does without %d published tensors: %s", engine.name, len(left_out), shown(left_out))
    logger.info("%s joined with %d workers, serving %s", engine.name, len(engine.workers), engine.version)
    for worker in engine.workers:
        said = worker.landings
        beside = f"{said.shadow_nbytes} bytes in {said.shadow}" if said.shadow_nbytes else "nothing"
        logger.info("%s worker %d: %s, %s beside the live weights", engine.name, worker.member.rank, said.mode, beside)
