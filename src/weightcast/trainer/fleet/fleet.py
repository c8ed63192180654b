"""The fleet: engines of one publisher, their workers, plans and transports.

``admit`` brings an engine's workers into the control channel; ``set_up`` begins an epoch for some engines: transports are chosen,
plans compiled on both sides and compared, pairs connected. A worker whose round failed is set up again before the next one,
because a transport that was aborted is dead.
"""

from __future__ import annotations

import logging
import secrets
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass

from weightcast.content.expected import ExpectedDigest, plan_key, whole_copies
from weightcast.control.coordinator import Coordinator, Member
from weightcast.deadline import Deadline
from weightcast.errors import (
    DeadlineExceeded,
    GroupBroken,
    PeerLost,
    PlanMismatch,
    StateError,
    Unsupported,
    WeightcastError,
)
from weightcast.layout import image_layout, most_placements
from weightcast.manifest import ALIGNMENT, Manifest
from weightcast.manifest.names import shown
from weightcast.messages import MAX_FRAME_NBYTES, Landings, ModeWish, Offer, Ready, Setup, Welcome
from weightcast.plan import Plan, compile_plan, parts_of, plan_digest
from weightcast.sources.holder import Holder
from weightcast.trainer.fleet.choice import Choice
from weightcast.trainer.fleet.groups import Group, groups_of, mates_of
from weightcast.trainer.fleet.link import EngineLink, SendingEnd, WorkerLink
from weightcast.trainer.fleet.places import places_of
from weightcast.trainer.fleet.ties import Ties
from weightcast.trainer.ranks import Ranks, SharedEnd
from weightcast.trainer.ranks.all_ranks import LEADER, SharedDigest
from weightcast.transports.base import TrainerEnd, Transport

logger = logging.getLogger(__name__)

WORD_TIMEOUT_S = 0.5
"""How long a worker whose connection broke is asked for its own reason."""
MAX_LEFT = 64
"""How many dismissed engines are told of: those before them have heard of their dismissal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSettings:
    """How a Publisher wants its fleet to be reached."""

    transport: str | None
    mode: ModeWish
    bucket_nbytes: int | None
    takeover: bool
    address: str
    shadows: int = 1
    unused: tuple[str, ...] = ()
    """Patterns of tensors that engines may have no use for."""
    share: bool = True
    """Whether engines may share transfers, by transports that can: where one breaks all do."""


PLACEMENT_NBYTES = 512
"""More than what one placement takes in a message, long names included."""
BUCKETS_A_WINDOW = 4
PLANNING_SHARE = 0.5
"""Share of the time left that planning for one worker may take."""


class Fleet:
    """All engines of one Publisher, their plans and pairs. Not thread-safe: one call at a time."""

    def __init__(self, holder: Holder, coordinator: Coordinator, settings: FleetSettings, ranks: Ranks) -> None:
        self._holder = holder
        self.ranks = ranks
        self._coordinator = coordinator
        self._settings = settings
        self._session = secrets.token_hex(8)
        self._left: deque[str] = deque(maxlen=MAX_LEFT)
        self.engines: list[EngineLink] = []
        self.epoch = 0
        self.number_used = 0
        """The highest version number that this trainer has used or found in its log."""
        self.expected: dict[str, ExpectedDigest | SharedDigest] = {}
        self._content_key: str | None = None
        self.ties = Ties(ranks)
        self._choice = Choice(ranks, settings.transport)
        coordinator.greet_with(self._welcome)

    def _welcome(self, member: Member) -> Welcome:
        return Welcome(
            session=self._session,
            manifest=self.ranks.manifest,
            mode=self._settings.mode,
            shadows=self._settings.shadows,
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
        world_size = engine.client.world_size(deadline)
        ticket = self._coordinator.issue_ticket(
            engine.name, world_size, large_nbytes=landings_nbytes(self.ranks.manifest)
        )
        engine.client.init(
            {
                "address": f"tcp://{self._settings.address}:{self._coordinator.port}",
                "public_key": self._coordinator.public_key,
                "ticket": ticket,
                "engine": engine.name,
                "timeout_s": deadline.limit_s(),
                "silence_s": self._coordinator.silence_s,
                "takeover": self._settings.takeover and not engine.was_here,
                "session": self._session,
                "left": list(self._left),
                "world_size": world_size,
            },
            deadline,
        )
        workers = []
        for member in self._coordinator.wait_members(engine.name, world_size, deadline):
            landings = self._coordinator.take(member, Landings, deadline, phase="join")
            assert isinstance(landings, Landings)
            landings.layout.check(self.ranks.manifest)
            landings.layout.check_size(self.ranks.manifest)
            workers.append(WorkerLink(member, landings))
        layouts = [worker.landings.layout for worker in workers]
        engine.places = places_of(self.ranks.manifest, self.ranks.holdings, layouts, self._settings.unused)
        others = [other.highest for other in self.engines if other is not engine]
        engine.greet(workers, max([self.number_used, engine.highest, *others]))
        if engine.places.unused:
            left_out = engine.places.unused
            logger.info("%s does without %d published tensors: %s", engine.name, len(left_out), shown(left_out))
        logger.info("%s joined with %d workers, serving %s", engine.name, world_size, engine.version)
        for worker in workers:
            said = worker.landings
            beside = f"{said.shadow_nbytes} bytes in {said.shadow}" if said.shadow_nbytes else "nothing"
            logger.info(
                "%s worker %d: %s, %s beside the live weights", engine.name, worker.member.rank, said.mode, beside
            )

    def probe(self, engines: Iterable[EngineLink]) -> None:
        """Notice workers of these engines whose connection has closed."""
        self._coordinator.probe(worker.member for engine in engines for worker in engine.workers)

    # -- an epoch

    def set_up(self, engines: Sequence[EngineLink], deadline: Deadline) -> dict[str, WeightcastError]:
        """Begin an epoch for these engines; returns the errors of those that did not get ready, by name.

        An engine whose pairs broke because of another one that failed is in no error: it has to be set up again without
        that one. Neither is one whose transport turned out to be of no use: it has to be set up again with the next best.
        """
        self.epoch = self._coordinator.epoch = self.epoch + 1
        self._part(engines)
        failures: dict[str, WeightcastError] = {}
        again: set[str] = set()
        for engine in engines:
            engine.broken = "set-up did not finish"
            self._coordinator.clear_inboxes(worker.member for worker in engine.workers)
            with _noting(engine, failures):
                for worker in engine.workers:
                    worker.close_end()
                    worker.at = (self.epoch, 0)
                    self._choice.choose(worker)
        engines = [engine for engine in engines if engine.name not in failures]
        errors = self._adopt(engines, deadline)
        for engine in engines:
            for worker in engine.workers:
                if worker.transport is not None and worker.transport.name in errors:
                    self._blame(engine, worker, errors[worker.transport.name], failures, again, by_trainer=True)
        engines = [engine for engine in engines if engine.name not in {*failures, *again}]
        is_streamed = self._holder.source.layout.is_streamed
        if not is_streamed and any(self.ties.doubtful(engine) for engine in engines):
            self.ranks.refresh(deadline)
        for engine in engines:
            with _noting(engine, failures):
                if is_streamed:
                    _refuse_in_place(engine)  # and tied tensors are compared when they come
                else:
                    self.ties.check(engine, self._holder.source.memory, deadline)
                for worker in engine.workers:
                    self._expect(worker, deadline)
        present = [engine for engine in engines if engine.name not in failures]
        groups = groups_of(present, share=self._settings.share)
        mates = mates_of(groups)
        for engine in present:
            engine.mates = mates[engine.name]
        for group in groups:
            self._offer(group, deadline, failures, again)
        for engine in present:
            if engine.name in {*failures, *again}:
                for worker in engine.workers:
                    worker.close_end()  # nobody waits for it in another group
        pairs = [(e, w) for e in engines if e.name not in {*failures, *again} for w in e.workers]
        with ThreadPoolExecutor(max(1, len(pairs))) as pool:
            futures = [(pool.submit(self._connect, worker, deadline), engine, worker) for engine, worker in pairs]
        cut_off: dict[str, WeightcastError] = {}
        for future, engine, worker in futures:
            try:
                future.result()
            except GroupBroken as error:
                cut_off[engine.name] = error
            except WeightcastError as error:
                self._blame(engine, worker, error, failures, again, by_trainer=False)
        if not failures and not again:
            failures = cut_off
        for engine in engines:
            if engine.name not in {*failures, *again, *cut_off}:
                engine.broken = None
        self._forget_unneeded()
        return failures

    def _blame(
        self,
        engine: EngineLink,
        worker: WorkerLink,
        error: WeightcastError,
        failures: dict[str, WeightcastError],
        again: set[str],
        *,
        by_trainer: bool,
    ) -> None:
        """Note that an engine is not set up, or that it has to be ``again``, with another transport for this worker."""
        if engine.name not in failures and self._choice.pass_over(engine, worker, error, by_trainer=by_trainer):
            again.add(engine.name)
        else:
            failures.setdefault(engine.name, error.at(engine=engine.name, phase="setup"))
            again.discard(engine.name)

    def _part(self, engines: Sequence[EngineLink]) -> None:
        """Engines that shared pairs with these have to be set up again, too."""
        names = {engine.name for engine in engines}
        for engine in self.engines:
            if engine.name not in names and engine.mates & names and engine.broken is None:
                engine.broken = "an engine that shared its transfers was set up again"

    def regroup(self, engines: Sequence[EngineLink]) -> None:
        """Mark engines as broken whose pairs are not shared as rounds of exactly these engines need it."""
        present = [engine for engine in engines if engine.joined and engine.broken is None]
        mates = mates_of(groups_of(present, share=self._settings.share))
        for engine in present:
            if engine.mates != mates[engine.name]:
                engine.broken = "its transfers are shared with other engines than those of the round"

    def _adopt(self, engines: Sequence[EngineLink], deadline: Deadline) -> dict[str, WeightcastError]:
        """Let each of their transports make the memory of all ranks reachable, once; errors by transport. A moved memory is the
        source's from then on, and engines whose pairs read the former one have to be set up again."""
        before, moved = self._holder.source.memory, False
        errors: dict[str, WeightcastError] = {}
        for name in sorted({w.transport.name for e in engines for w in e.workers if w.transport is not None}):
            try:
                self._holder.adopt([name])
                moved = self.ranks.adopt([name], deadline) or moved
            except (PeerLost, DeadlineExceeded, StateError):
                raise
            except WeightcastError as error:
                errors[name] = error
        if moved or self._holder.source.memory is not before:
            self._forget_memory()
            for engine in self.engines:
                if engine not in engines and engine.broken is None:
                    engine.broken = "the source's memory moved"
        return errors

    def _expect(self, worker: WorkerLink, deadline: Deadline) -> None:
        """Compile the worker's plan, and be ready to digest what it gets."""
        # A worker whose landings take long to plan leaves time for those of the others.
        limit = deadline.part(PLANNING_SHARE)
        plan = compile_plan(
            self.ranks.manifest,
            self.ranks.holdings,
            worker.landings.layout,
            check=lambda: limit.check("planning a worker's landings"),
        )
        worker.plan, worker.plan_digest, worker.digest_key = plan, plan_digest(plan), plan_key(plan)
        worker.parts = tuple(parts_of(plan.get(LEADER, ())))
        if worker.digest_key not in self.expected:
            self.expected[worker.digest_key] = self.ranks.expected(worker.digest_key, plan, deadline)

    def _offer(
        self,
        group: Group,
        deadline: Deadline,
        failures: dict[str, WeightcastError],
        again: set[str],
    ) -> None:
        """Make the sending side of a group's pairs and tell its workers; an error is that of all its engines."""
        transport = group[0][1].transport
        assert transport is not None
        try:
            opened = self._open(transport, group[0][1].plan, len(group), deadline)
        except WeightcastError as error:
            for engine, worker in group:
                self._blame(engine, worker, copy(error), failures, again, by_trainer=True)
            return
        for (_, worker), (end, offers) in zip(group, opened, strict=True):
            worker.end = end
            timeout_s = deadline.limit_s()
            setup = Setup(epoch=self.epoch, holdings=dict(self.ranks.holdings), offers=offers, timeout_s=timeout_s)
            self._coordinator.send(worker.member, setup)

    def _open(
        self, transport: Transport, plan: Plan, count: int, deadline: Deadline
    ) -> list[tuple[SendingEnd, tuple[Offer, ...]]]:
        """The sending sides of a group of workers that want the same, on all ranks that have something for them, and what each
        offers."""
        settings = self._settings
        bucket_nbytes = settings.bucket_nbytes or self._bucket_nbytes(transport)
        own: list[TrainerEnd] = []
        if LEADER in plan:
            own = transport.trainer_ends(
                count,
                plan[LEADER],
                self._holder.source.memory,
                bucket_nbytes=bucket_nbytes,
                address=settings.address,
            )
        offered: list[tuple[Offer, ...]] = [
            (Offer(rank=LEADER, transport=transport.name, data=end.offer()),) for end in own
        ] or [()] * count
        if self.ranks.alone and own:
            return list(zip(own, offered, strict=True))
        try:
            pairs = self.ranks.pair(transport.name, plan, count, bucket_nbytes, deadline)
        except WeightcastError:
            for end in own:
                end.close()
            raise
        everywhere: list[tuple[SendingEnd, tuple[Offer, ...]]] = []
        for number, (numbers, others) in enumerate(pairs):
            shared = SharedEnd(self.ranks, own[number] if own else None, numbers)
            everywhere.append((shared, (*offered[number], *others)))
        return everywhere

    def _bucket_nbytes(self, transport: Transport) -> int:
        """That of the transport; smaller for a stream, so that a window is several: each is packed while the one before it travels."""
        layout = self._holder.source.layout
        if not layout.is_streamed:
            return transport.default_bucket_nbytes
        window = max(layout.storage_nbytes, default=0)
        return max(ALIGNMENT, min(transport.default_bucket_nbytes, window // BUCKETS_A_WINDOW // ALIGNMENT * ALIGNMENT))

    def content(self, deadline: Deadline) -> ExpectedDigest | SharedDigest:
        """The digest of all that is published; shared with workers that want exactly that."""
        if self._content_key is None or self._content_key not in self.expected:
            plan = self._whole_plan()
            self._content_key = plan_key(plan)
            if self._content_key not in self.expected:
                self.expected[self._content_key] = self.ranks.expected(self._content_key, plan, deadline)
        return self.expected[self._content_key]

    def _whole_plan(self) -> Plan:
        """Copies that stand for everything that is published, each value once, however many ranks hold it."""
        manifest = self.ranks.manifest
        if self.ranks.alone:
            return {LEADER: tuple(whole_copies(manifest, self._holder.source.layout))}
        return compile_plan(manifest, self.ranks.holdings, image_layout(manifest))

    def _connect(self, worker: WorkerLink, deadline: Deadline) -> None:
        assert worker.end is not None
        member = worker.member
        try:
            worker.end.connect(deadline)
        except GroupBroken:
            raise
        except WeightcastError as error:
            # The worker's own word says more than a broken connection; it is asked for briefly.
            with suppress(DeadlineExceeded, PeerLost):
                self._take_ready(member, Deadline(WORD_TIMEOUT_S))
            named = worker.named(error.at(engine=member.engine, worker=member.rank, phase="setup"))
            if named is error:
                raise
            raise named from error
        ready = self._take_ready(member, deadline)
        if ready.plan_digest != worker.plan_digest:
            raise PlanMismatch(
                "the worker compiled another plan", engine=member.engine, worker=member.rank, phase="setup"
            )

    def _take_ready(self, member: Member, deadline: Deadline) -> Ready:
        def is_this_epoch(message: object) -> bool:
            return getattr(message, "epoch", None) == self.epoch

        ready = self._coordinator.take(member, Ready, deadline, phase="setup", matches=is_this_epoch)
        assert isinstance(ready, Ready)
        return ready

    # -- leaving

    def _close_workers(self, engine: EngineLink, reason: str, *, settled: bool = True) -> None:
        """Also those who joined and whom an admission that failed did not count. ``settled``: the engine is in no round."""
        for worker in engine.workers:
            worker.close_end()
        self._coordinator.forget_engine(engine.name, reason, settled=settled)
        engine.workers = []

    def remove(self, engine: EngineLink, *, settled: bool = True) -> None:
        """Dismiss an engine; it goes on with what it serves. ``settled``: it is in no round."""
        self._close_workers(engine, "it closed the publisher, or dismissed this engine", settled=settled)
        engine.client.close()
        self.engines.remove(engine)
        self._left.append(engine.name)
        self._forget_unneeded()

    def _forget_unneeded(self) -> None:
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


def _refuse_in_place(engine: EngineLink) -> None:
    """Raise Unsupported for an engine that has no staged copy: what it is to commit is known once a stream was read to its end."""
    if engine.in_place:
        raise Unsupported(
            "a stream cannot be written in place: an engine would have to stand still while the stream is produced",
            hint="Let the engine have a staged copy: mode='staged', or more free memory on its device\n"
            "Or publish tensors that are there at once: a module, or a state dict",
        )


@contextmanager
def _noting(engine: EngineLink, failures: dict[str, WeightcastError]) -> Iterator[None]:
    """Note the first error of an engine; the others go on."""
    try:
        yield
    except WeightcastError as error:
        failures.setdefault(engine.name, error.at(engine=engine.name, phase="setup"))
