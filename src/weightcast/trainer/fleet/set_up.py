"""Set-up: an epoch begins for some engines. Transports are chosen, plans compiled on both sides and compared, pairs connected.

A worker whose round failed is set up again before the next round, because a transport that was aborted is dead.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import copy
from functools import cached_property, partial

from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, GroupBroken, PeerLost, PlanMismatch, WeightcastError
from weightcast.facts import Facts
from weightcast.layout.table import LayoutTable
from weightcast.manifest import ALIGNMENT
from weightcast.manifest.names import shown
from weightcast.messages import Message, Offer, Ready, Setup
from weightcast.plan import Plan, compile_plan, parts_of, ranks_meet
from weightcast.trainer.fleet.chains import chain_up
from weightcast.trainer.fleet.codec import Codec
from weightcast.trainer.fleet.fleet import Fleet
from weightcast.trainer.fleet.groups import TransferGroup, feeds_itself, groups_of, mates_of
from weightcast.trainer.fleet.link import EngineLink, SendingEnd, WorkerLink
from weightcast.trainer.fleet.sites import site_of, unknown_names
from weightcast.trainer.ranks import SharedEnd
from weightcast.trainer.ranks.all_ranks import RANK_0
from weightcast.transports.base import TrainerEnd, Transport

logger = logging.getLogger(__name__)

BUCKETS_A_WINDOW = 4
"""Buckets that a window of a stream is at least: each is packed while the one before it travels."""
PLANNING_SHARE = 0.5
"""Share of the time left that planning for one worker may take."""
PULLED_AT_ONCE = 16
"""Pairs that are pulled over and connect at the same time."""
WORD_TIMEOUT_S = 0.5
"""How long a worker whose connection broke is asked for its own reason."""


def set_up(fleet: Fleet, engines: Sequence[EngineLink], deadline: Deadline) -> dict[str, WeightcastError]:
    """Begin an epoch for these engines; returns the errors of those that did not get ready, by name.

    An engine whose pairs broke because of another one that failed is in no error: it has to be set up again without
    that one. Neither is one whose transport turned out to be of no use: it has to be set up again with the next best.
    """
    return _SetUp(fleet, engines, deadline).run()


class _SetUp:
    """One epoch's set-up. Each step leaves out engines for which an earlier step found an error."""

    def __init__(self, fleet: Fleet, engines: Sequence[EngineLink], deadline: Deadline) -> None:
        self._fleet, self._deadline = fleet, deadline
        self._engines = engines
        self._failures: dict[str, WeightcastError] = {}
        self._again: set[str] = set()
        """Engines that have to be set up again with another transport."""
        self._plans: dict[LayoutTable, Plan] = {}
        """By landings: workers whose layouts are equal have one plan."""
        self._meeting: set[LayoutTable] = set()
        """Landings in whose bytes values of several ranks meet."""
        self._relays: dict[tuple[LayoutTable, str], bool] = {}
        """By landings and transport: whether workers can feed each other."""
        self._cut_off: dict[str, WeightcastError] = {}
        """Engines whose pairs broke because of another engine."""

    def run(self) -> dict[str, WeightcastError]:
        self._fleet.progress("set-up")
        self._fleet.begin_epoch(self._engines)
        self._choose_transports()
        self._make_memory_reachable()
        self._compile_plans()
        self._offer_pairs()
        self._connect_pairs()
        failures = self._failures if self._failures or self._again else self._cut_off
        for engine in self._present():
            if engine.name not in self._cut_off:
                engine.broken = None
        self._fleet.forget_unneeded()
        return failures

    def _present(self) -> list[EngineLink]:
        """Engines for which no step has found an error so far."""
        return [engine for engine in self._engines if engine.name not in {*self._failures, *self._again}]

    def _blame(self, engine: EngineLink, worker: WorkerLink, error: WeightcastError, *, by_trainer: bool) -> None:
        """Note that an engine is not set up, or that it has to be set up again, with another transport for this worker."""
        passed_over = engine.name not in self._failures and self._fleet.choice.pass_over(
            engine, worker, error, by_trainer=by_trainer
        )
        if passed_over:
            self._again.add(engine.name)
        else:
            self._failures.setdefault(engine.name, error.at(engine=engine.name, phase="setup"))
            self._again.discard(engine.name)

    @contextmanager
    def _noting(self, engine: EngineLink) -> Iterator[None]:
        """Note the first error of an engine; the others go on."""
        try:
            yield
        except WeightcastError as error:
            self._failures.setdefault(engine.name, error.at(engine=engine.name, phase="setup"))

    # -- steps

    def _choose_transports(self) -> None:
        for engine in self._engines:
            engine.broken = "set-up did not finish"
            self._fleet.coordinator.clear_inboxes(worker.member for worker in engine.workers)
            with self._noting(engine):
                for worker in engine.workers:
                    worker.close_end()
                    worker.at = (self._fleet.epoch, 0)
                    self._fleet.choice.choose(worker)

    def _make_memory_reachable(self) -> None:
        engines = self._present()
        names = {w.transport.name for e in engines for w in e.workers if w.transport is not None}
        errors = self._fleet.adopt(sorted(names), engines, self._deadline)
        for engine in engines:
            for worker in engine.workers:
                if worker.transport is not None and worker.transport.name in errors:
                    self._blame(engine, worker, errors[worker.transport.name], by_trainer=True)

    def _compile_plans(self) -> None:
        fleet, engines = self._fleet, self._present()
        is_streamed = fleet.source.layout.is_streamed  # then tied tensors are compared when they come
        if not is_streamed and any(fleet.ties.doubtful(engine) for engine in engines):
            fleet.ranks.refresh(self._deadline)
        for engine in engines:
            with self._noting(engine):
                if not is_streamed:
                    fleet.ties.check(engine, fleet.source.memory, self._deadline)
                for worker in engine.workers:
                    self._compile(worker)
                    worker.site = self._site_of(engine, worker)

    def _compile(self, worker: WorkerLink) -> None:
        """Compile the worker's plan, and be ready to digest what it gets."""
        # A worker whose landings take long to plan leaves time for those of the others.
        limit = self._deadline.part(PLANNING_SHARE)
        ranks, layout = self._fleet.ranks, worker.landings.layout
        if layout not in self._plans:
            self._plans[layout] = compile_plan(
                ranks.manifest,
                ranks.holdings,
                layout,
                check=lambda: limit.check("planning a worker's landings"),
            )
            if self._fleet.settings.delta and ranks_meet(self._plans[layout], layout):
                self._meeting.add(layout)
        plan = self._plans[layout]
        worker.plan, worker.digest_key = plan, plan.key
        worker.parts = tuple(parts_of(plan.get(RANK_0, ())))
        self._fleet.expect(worker.digest_key, plan, self._deadline)

    def _site_of(self, engine: EngineLink, worker: WorkerLink) -> str:
        """Where a worker is fed by others and feeds them; empty where nobody does, and then ``no_relay`` says why if it is in a site."""
        relay, transport = self._fleet.settings.relay, worker.transport
        assert transport is not None
        site = site_of(relay, engine, worker, self._facts) if relay else ""
        worker.no_relay = worker.suspicion if site else ""
        if not site or worker.suspicion:
            return ""
        kind = (worker.landings.layout, transport.name)
        if kind not in self._relays:
            self._relays[kind] = all(map(transport.relays, _plan_of(worker).values()))
        if not self._relays[kind]:
            worker.no_relay = "no relay, as values are cast where they land or the transport has none"
            return ""
        return site

    @cached_property
    def _facts(self) -> Facts:
        """Of this process."""
        return self._fleet.ranks.facts()[RANK_0]

    def _offer_pairs(self) -> None:
        present = self._present()
        if strangers := unknown_names(self._fleet.settings.relay, self._fleet.engines):
            logger.warning("relay names engines that are not in the fleet: %s", shown(strangers))
        groups = groups_of(present, share=self._fleet.settings.shares)
        mates = mates_of(groups)
        for engine in present:
            engine.mates = mates[engine.name]
        for group in groups:
            self._offer(group)
        for engine in present:
            if engine.name in {*self._failures, *self._again}:
                for worker in engine.workers:
                    worker.close_end()  # nobody waits for it in another group

    def _offer(self, group: TransferGroup) -> None:
        """Make the sending side of a group's pairs and tell its workers; an error is that of all its engines."""
        transport, deadline = group[0][1].transport, self._deadline
        assert transport is not None
        try:
            opened = self._open(transport, group)
        except WeightcastError as error:
            for engine, worker in group:
                self._blame(engine, worker, copy(error), by_trainer=True)
            return
        chain_up([worker for _, worker in group], self._fleet.settings.relay, feeds_itself(group))
        for (_, worker), (end, offers) in zip(group, opened, strict=True):
            worker.end = end
            worker.codec = Codec(wish=self._fleet.settings.delta, refused=self._no_changes(transport, worker))
            holdings, epoch = _plan_of(worker).holdings, self._fleet.epoch
            setup = Setup(epoch=epoch, holdings=holdings, offers=offers, timeout_s=deadline.limit_s())
            self._fleet.coordinator.send(worker.member, setup)

    def _open(self, transport: Transport, group: TransferGroup) -> list[tuple[SendingEnd, tuple[Offer, ...]]]:
        """The sending sides of a group of workers that want the same, on all ranks that have something for them, and what each
        offers."""
        settings, ranks = self._fleet.settings, self._fleet.ranks
        plan, count = _plan_of(group[0][1]), len(group)
        bucket_nbytes = settings.bucket_nbytes or self._bucket_nbytes(transport)
        patience_s = settings.silence_s if feeds_itself(group) else 0.0
        own: list[TrainerEnd] = []
        if RANK_0 in plan:
            memory, address = self._fleet.source.memory, settings.reached_at
            own = transport.ends_of(
                count, plan[RANK_0], memory, bucket_nbytes=bucket_nbytes, address=address, patience_s=patience_s
            )
        keeps = bool(settings.delta) and not all(self._no_changes(transport, worker) for _, worker in group)
        if keeps:
            for end in own:
                end.keep(self._fleet.kept, plan.key, ranks.manifest)
        offered: list[tuple[Offer, ...]] = [
            (Offer(rank=RANK_0, transport=transport.name, data=end.offer()),) for end in own
        ] or [()] * count
        if ranks.alone and own:
            return list(zip(own, offered, strict=True))
        try:
            pairs = ranks.pair(
                transport.name, plan, count, bucket_nbytes, self._deadline, keeps=keeps, patience_s=patience_s
            )
        except WeightcastError:
            for end in own:
                end.close()
            raise
        everywhere: list[tuple[SendingEnd, tuple[Offer, ...]]] = []
        for number, (numbers, others) in enumerate(pairs):
            shared = SharedEnd(ranks.line, own[number] if own else None, numbers)
            everywhere.append((shared, (*offered[number], *others)))
        return everywhere

    def _no_changes(self, transport: Transport, worker: WorkerLink) -> str:
        """Why changes cannot be sent to a worker by a transport; empty where they can."""
        if self._fleet.source.layout.is_streamed:
            return "a stream passes by, and nothing of it is kept"
        if not transport.carries_changes:
            return f"{transport.name} brings all values"
        # Each of them would add its difference to what is there.
        return (
            "several trainer ranks fill the same bytes of tied tensors"
            if worker.landings.layout in self._meeting
            else ""
        )

    def _bucket_nbytes(self, transport: Transport) -> int:
        """That of the transport; for a stream no more than a part of a window."""
        layout = self._fleet.source.layout
        if not layout.is_streamed:
            return transport.default_bucket_nbytes
        part = max(layout.storage_nbytes, default=0) // BUCKETS_A_WINDOW // ALIGNMENT * ALIGNMENT
        return max(ALIGNMENT, min(transport.default_bucket_nbytes, part))

    def _connect_pairs(self) -> None:
        """Pairs that are pushed over connect side by side, a thread for each, as all of a group have to come together. Those that are
        pulled over need no thread for long."""
        pairs = [(engine, worker) for engine in self._present() for worker in engine.workers]
        pairs.sort(key=lambda pair: pair[1].pulls)
        pushed = sum(not worker.pulls for _, worker in pairs)
        with ThreadPoolExecutor(pushed + PULLED_AT_ONCE) as pool:
            futures = [pool.submit(self._connect, worker) for _, worker in pairs]
        connected = {
            pair[1].member: pair
            for pair, future in zip(pairs, futures, strict=True)
            if self._is_well(future.result, *pair)
        }
        for member, ready in self._fleet.coordinator.take_each(
            list(connected), Ready, self._deadline, phase="setup", matches=self._is_of_epoch
        ):
            engine, worker = connected[member]
            self._is_well(partial(_check_ready, worker, ready), engine, worker)

    def _is_well(self, result: Callable[[], None], engine: EngineLink, worker: WorkerLink) -> bool:
        """Whether a step of a worker's raises nothing; what it raises is noted."""
        try:
            result()
        except GroupBroken as error:
            self._cut_off[engine.name] = error
        except WeightcastError as error:
            self._blame(engine, worker, error, by_trainer=False)
        else:
            return True
        return False

    def _connect(self, worker: WorkerLink) -> None:
        assert worker.end is not None
        member = worker.member
        try:
            worker.end.connect(self._deadline)
        except GroupBroken:
            raise
        except WeightcastError as error:
            # The worker's own word says more than a broken connection; it is asked for briefly.
            with suppress(DeadlineExceeded, PeerLost):
                self._fleet.coordinator.take(
                    member, Ready, Deadline(WORD_TIMEOUT_S), phase="setup", matches=self._is_of_epoch
                )
            named = worker.named(error.at(engine=member.engine, worker=member.rank, phase="setup"))
            if named is error:
                raise
            raise named from error

    def _is_of_epoch(self, message: Message) -> bool:
        return getattr(message, "epoch", None) == self._fleet.epoch


def _check_ready(worker: WorkerLink, ready: Message | WeightcastError) -> None:
    if isinstance(ready, WeightcastError):
        raise ready
    assert isinstance(ready, Ready)
    if ready.plan_digest != _plan_of(worker).digest:
        where = {"engine": worker.member.engine, "worker": worker.member.rank, "phase": "setup"}
        raise PlanMismatch("the worker compiled another plan", **where)  # type: ignore[arg-type]


def _plan_of(worker: WorkerLink) -> Plan:
    assert worker.plan is not None
    return worker.plan
