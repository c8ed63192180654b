"""The fleet: engines of one publisher, their workers, plans and transports.

``admit`` brings an engine's workers into the control channel; ``set_up`` begins an epoch for some engines: transports are chosen,
plans compiled on both sides and compared, pairs connected. A worker whose round failed is set up again before the next one,
because a transport that was aborted is dead.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from weightcast.control.coordinator import Coordinator, Member
from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, PeerLost, PlanMismatch, StateError, WeightcastError
from weightcast.memory import Memory
from weightcast.messages import Landings, ModeWish, Offer, Ready, Setup, Welcome
from weightcast.plan import compile_plan, plan_digest
from weightcast.trainer.links import EngineLink, WorkerLink
from weightcast.trainer.proof import ExpectedDigest, copies_key, whole_copies
from weightcast.trainer.sources.base import Source
from weightcast.transports.base import Transport
from weightcast.transports.facts import local_facts
from weightcast.transports.registry import registry

logger = logging.getLogger(__name__)

WORD_TIMEOUT_S = 0.5
"""How long a worker whose connection broke is asked for its own reason."""
THIS_RANK = 0
"""Trainer rank of this process; one process publishes everything it holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSettings:
    """How a Publisher wants its fleet to be reached."""

    transport: str | None
    mode: ModeWish
    bucket_nbytes: int
    takeover: bool
    address: str
    shadows: int = 1


class Fleet:
    """All engines of one Publisher, their plans and pairs. Not thread-safe: one call at a time."""

    def __init__(self, source: Source, coordinator: Coordinator, settings: FleetSettings) -> None:
        self._source = source
        self._coordinator = coordinator
        self._settings = settings
        self._session = secrets.token_hex(8)
        self._adopted: dict[str, Memory] = {}
        self.engines: list[EngineLink] = []
        self.epoch = 0
        self.expected: dict[str, ExpectedDigest] = {}
        self._content_key: str | None = None
        coordinator.greet_with(self._welcome)

    def _welcome(self, member: Member) -> Welcome:
        return Welcome(
            session=self._session,
            manifest=self._source.manifest,
            mode=self._settings.mode,
            shadows=self._settings.shadows,
            heartbeat_s=self._coordinator.heartbeat_s,
            silence_s=self._coordinator.silence_s,
        )

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
        ticket = self._coordinator.issue_ticket(engine.name, world_size)
        engine.client.init(
            {
                "address": f"tcp://{self._settings.address}:{self._coordinator.port}",
                "public_key": self._coordinator.public_key,
                "ticket": ticket,
                "engine": engine.name,
                "timeout_s": max(deadline.remaining_s(), 0.001),
                "takeover": self._settings.takeover,
                "session": self._session,
            },
            deadline,
        )
        workers = []
        for member in self._coordinator.wait_members(engine.name, world_size, deadline):
            landings = self._coordinator.take(member, Landings, deadline, phase="join")
            assert isinstance(landings, Landings)
            landings.layout.check(self._source.manifest)
            workers.append(WorkerLink(member, landings))
        hello = workers[0].member.hello
        engine.version, engine.digest, engine.dirty = hello.version, hello.digest, hello.dirty
        engine.workers, engine.broken, engine.joined = workers, "not set up", True
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
        """Begin an epoch for these engines; returns the errors of those that did not get ready, by name."""
        self.epoch += 1
        failures: dict[str, WeightcastError] = {}
        for engine in engines:
            engine.broken = "set-up did not finish"
            self._coordinator.clear_inboxes(worker.member for worker in engine.workers)
            with _noting(engine, failures):
                for worker in engine.workers:
                    worker.close_end()
                    worker.at = (self.epoch, 0)
                    self._choose(worker)
        engines = [engine for engine in engines if engine.name not in failures]
        self._adopt({w.transport for e in engines for w in e.workers if w.transport is not None}, engines)
        for engine in engines:
            with _noting(engine, failures):
                for worker in engine.workers:
                    self._offer(worker, deadline)
        pairs = [(e, w) for e in engines if e.name not in failures for w in e.workers]
        with ThreadPoolExecutor(max(1, len(pairs))) as pool:
            futures = [(engine, pool.submit(self._connect, worker, deadline)) for engine, worker in pairs]
        for engine, future in futures:
            with _noting(engine, failures):
                future.result()
        for engine in engines:
            if engine.name not in failures:
                engine.broken = None
        return failures

    def _choose(self, worker: WorkerLink) -> None:
        trainer = local_facts(self._source.device)
        worker.transport, worker.reason = registry().choose(
            trainer, worker.member.hello.facts, self._settings.transport
        )
        logger.info("%s worker %d: %s", worker.member.engine, worker.member.rank, worker.reason)

    def _adopt(self, transports: Iterable[Transport], engines: Sequence[EngineLink]) -> None:
        """Let each transport make the source's memory reachable, once; a moved memory is the source's from then on, and
        engines whose pairs read the former one have to be set up again."""
        before = self._source.memory
        if not self._adopted and self._source.device.type == "cpu":
            # One arena makes a round's cost independent of the number of tensors, for copies and digests alike.
            self._source.consolidate()
        for transport in sorted(transports, key=lambda t: t.name):
            if transport.name in self._adopted:
                continue
            memory = transport.adopt(self._source.memory)
            if memory is not self._source.memory:
                self._source.rebind(memory)
            self._adopted[transport.name] = memory
        if self._source.memory is not before:
            self.expected.clear()
            for engine in self.engines:
                if engine not in engines and engine.broken is None:
                    engine.broken = "the source's memory moved"

    def _offer(self, worker: WorkerLink, deadline: Deadline) -> None:
        source, transport = self._source, worker.transport
        assert transport is not None
        plan = compile_plan(source.manifest, {THIS_RANK: source.layout}, worker.landings.layout)
        worker.copies = plan.get(THIS_RANK, ())
        worker.digest_key = copies_key(worker.copies)
        if worker.digest_key not in self.expected:
            self.expected[worker.digest_key] = ExpectedDigest(source.manifest, worker.copies, source.memory)
        worker.end = transport.trainer_end(
            worker.copies,
            source.memory,
            bucket_nbytes=self._settings.bucket_nbytes,
            address=self._settings.address,
        )
        offer = Offer(rank=THIS_RANK, transport=transport.name, data=worker.end.offer())
        self._coordinator.send(
            worker.member,
            Setup(
                epoch=self.epoch,
                holdings={THIS_RANK: source.layout},
                offers=(offer,) if plan else (),
                timeout_s=max(deadline.remaining_s(), 0.001),
            ),
        )

    def content(self) -> ExpectedDigest:
        """The digest of all that is published; shared with workers that want exactly that."""
        if self._content_key is None or self._content_key not in self.expected:
            copies = whole_copies(self._source.manifest, self._source.layout)
            self._content_key = copies_key(copies)
            if self._content_key not in self.expected:
                self.expected[self._content_key] = ExpectedDigest(self._source.manifest, copies, self._source.memory)
        return self.expected[self._content_key]

    def _connect(self, worker: WorkerLink, deadline: Deadline) -> None:
        assert worker.end is not None
        member = worker.member
        try:
            worker.end.connect(deadline)
        except WeightcastError as error:
            # The worker's own word says more than a broken connection; it is asked for briefly.
            with suppress(DeadlineExceeded, PeerLost):
                self._take_ready(member, Deadline(WORD_TIMEOUT_S))
            named = worker.named(error.at(engine=member.engine, worker=member.rank, phase="setup"))
            if named is error:
                raise
            raise named from error
        ready = self._take_ready(member, deadline)
        mine = plan_digest({THIS_RANK: worker.copies} if worker.copies else {})
        if ready.plan_digest != mine:
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

    def _close_workers(self, engine: EngineLink, reason: str) -> None:
        """Also those who joined and whom an admission that failed did not count."""
        for worker in engine.workers:
            worker.close_end()
        known = [worker.member for worker in engine.workers]
        others = [m for m in self._coordinator.members(engine.name) if m not in known]
        self._coordinator.forget([*known, *others], reason)
        engine.workers = []

    def remove(self, engine: EngineLink) -> None:
        """Dismiss an engine; it goes on with what it serves."""
        self._close_workers(engine, "it closed the publisher, or dismissed this engine")
        engine.client.close()
        self.engines.remove(engine)

    def find(self, name: str) -> EngineLink:
        """The engine of that name; StateError lists the fleet when there is none."""
        for engine in self.engines:
            if engine.name == name.rstrip("/"):
                return engine
        raise StateError(f"{name!r} is not in the fleet", hint=f"Engines: {', '.join(e.name for e in self.engines)}")

    def close(self) -> None:
        """Dismiss all engines and free all transports; idempotent."""
        for engine in list(self.engines):
            self.remove(engine)
        for name, memory in self._adopted.items():
            registry().get(name).release(memory)
        self._adopted.clear()


@contextmanager
def _noting(engine: EngineLink, failures: dict[str, WeightcastError]) -> Iterator[None]:
    """Note the first error of an engine; the others go on."""
    try:
        yield
    except WeightcastError as error:
        failures.setdefault(engine.name, error.at(engine=engine.name, phase="setup"))
