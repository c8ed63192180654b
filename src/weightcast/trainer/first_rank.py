"""FirstRank: what a Publisher does on rank 0, the only one there mostly is. It joins engines, numbers rounds, runs them, keeps the book."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TypeVar

from weightcast.content.expected import ExpectedDigest
from weightcast.control.coordinator import GOODBYE_S, Coordinator
from weightcast.control.link import JoinInfo
from weightcast.deadline import Deadline
from weightcast.digest.versions import version_name, version_number
from weightcast.errors import BaseMismatch, RoundFailed, StateError, WeightcastError, WorkerLeft
from weightcast.report.model import Report
from weightcast.sources import Source
from weightcast.sources.holder import Holder
from weightcast.trainer.clients import EngineClient, SyncEngine, make_client, twins
from weightcast.trainer.clients.urls import engine_name
from weightcast.trainer.colocated import Colocated, Release
from weightcast.trainer.fleet.fleet import Fleet
from weightcast.trainer.fleet.letting_go import close_pairs
from weightcast.trainer.fleet.link import UNKNOWN, EngineLink
from weightcast.trainer.fleet.numbers import Numbers
from weightcast.trainer.fleet.presence import Presence, join_error, not_connected
from weightcast.trainer.fleet.waking import Waking
from weightcast.trainer.published import Published
from weightcast.trainer.ranks import Ranks
from weightcast.trainer.ranks.line import RANKS
from weightcast.trainer.ranks.shared_digest import SharedDigest
from weightcast.trainer.records import Records
from weightcast.trainer.round.round import Brief, Round
from weightcast.trainer.round.timeline import Timeline
from weightcast.trainer.settings import Settings

logger = logging.getLogger(__name__)

T = TypeVar("T")
RELEASE_AT_LEAST_S = 2.0
"""How long engines have for letting go of memory, however late the call is."""


class FirstRank:
    """The calls of a Publisher, whose docstrings say what they do. Not thread-safe: one call at a time.

    ``clients`` are the fleet's first engines, ``size`` is the number of trainer ranks.
    """

    def __init__(
        self,
        holder: Holder,
        clients: Sequence[EngineClient],
        settings: Settings,
        *,
        size: int,
    ) -> None:
        self._holder, self._settings = holder, settings
        links = [EngineLink(client) for client in clients]
        self.records = Records(links, log=settings.log)
        self._coordinator = Coordinator(settings.reached_at, silence_s=settings.silence_s)
        try:
            self._ranks = Ranks(holder, self._coordinator, size)
            self._fleet = Fleet(holder, self._coordinator, settings, self._ranks)
            self._fleet.engines = links
            self._presence = Presence(self._fleet, settings)
            self._published = Published(holder, self._ranks, self._fleet, self._presence, settings)
            self._numbers = Numbers(self._fleet, self.records.last_number)
            self._colocated = Colocated(self._fleet, self._ranks)
        except BaseException:
            self._coordinator.close()
            raise
        self._rounds = 0
        self._was_connected = False

    @property
    def _source(self) -> Source:
        return self._holder.source

    @property
    def engines(self) -> Sequence[EngineLink]:
        """All engines of the fleet."""
        return self._fleet.engines

    @property
    def expected(self) -> Mapping[str, ExpectedDigest | SharedDigest]:
        """Digests that rounds need of the source, by key."""
        return self._fleet.expected

    @property
    def alone(self) -> bool:
        """Whether there is no other rank."""
        return self._ranks.alone

    @property
    def last_report(self) -> Report | None:
        return self.records.last

    @property
    def control_address(self) -> str:
        return f"tcp://{self._settings.reached_at}:{self._coordinator.port}"

    def join_info(self) -> JoinInfo:
        """How the other ranks reach this one."""
        return JoinInfo(
            address=self.control_address,
            public_key=self._coordinator.public_key,
            ticket=self._ranks.line.ticket(),
            engine=RANKS,
            timeout_s=self._settings.timeout_s,
            silence_s=self._coordinator.silence_s,
        )

    def next_number(self) -> int:
        """That of the next round."""
        return self._numbers.next()

    def close(self, *, settled: bool) -> None:
        """``settled``: no call runs, so that no round is taken back after this."""
        with ExitStack() as rest:  # whatever interrupts one of them
            rest.callback(self.records.close)
            rest.callback(self._coordinator.close, goodbye_s=GOODBYE_S)
            rest.callback(self._fleet.close, settled=settled)
            self._presence.close()

    def check_caller(self) -> None:
        """Raise StateError on a thread that an engine needs, such as that of its event loop."""
        for engine in list(self._fleet.engines):
            engine.client.check_caller()

    def leave(self) -> None:
        """Leave all engines, and nothing else."""
        self._coordinator.close()

    # -- calls of all ranks

    def connect(self, deadline: Deadline, wait_s: float = 0.0) -> None:
        with self._fleet.waiting(wait_s):
            self._ranks.collectively("connect", deadline, self._and_lets_go(lambda: self._connect(deadline), deadline))

    def add(self, engine: str | EngineClient | SyncEngine, deadline: Deadline, wait_s: float = 0.0) -> Report | None:
        with self._fleet.waiting(wait_s):
            return self._ranks.collectively(
                "add", deadline, self._and_lets_go(lambda: self._add(engine, deadline), deadline)
            )

    def remove(self, name: str, deadline: Deadline) -> None:
        self._ranks.collectively("remove", deadline, lambda: self._remove(name))

    def publish(
        self, deadline: Deadline, *, wake: bool, release: Release | None, failure: Exception | None = None
    ) -> Report:
        """``failure``: why this rank has nothing to publish, which all ranks are told."""

        def failed() -> Report:
            assert failure is not None
            raise failure

        if failure is not None:
            return self._ranks.collectively("publish", deadline, failed)

        def awake() -> Report:
            return self._colocated.publish(lambda waking: self._publish(deadline, waking), release, deadline)

        one_round = self._and_lets_go(lambda: self._publish(deadline), deadline)
        return self._ranks.collectively("publish", deadline, awake if wake else one_round)

    # -- this rank's part of them

    def _and_lets_go(self, call: Callable[[], T], deadline: Deadline) -> Callable[[], T]:
        """The call, after which nobody holds anything of the source's memory, if the user asked for that."""
        if self._settings.hold == "always":
            return call

        def run() -> T:
            try:
                return call()
            finally:
                try:
                    self._let_go(Deadline(max(deadline.remaining_s(), RELEASE_AT_LEAST_S)))
                except WeightcastError as error:
                    logger.warning("not all of the source's memory was let go of: %s", str(error))

        return run

    def _let_go(self, deadline: Deadline) -> None:
        close_pairs(self._fleet, deadline)
        self._colocated.has_let_go = True
        self._ranks.let_go(self._fleet.let_go, deadline, always=True)

    def _renew_where_let_go(self, deadline: Deadline) -> None:
        """Look at sources anew that were let go of, so that their users could free memory."""
        if self._colocated.has_let_go:
            self._published.renew(deadline)
            self._colocated.has_let_go = False

    def _connect(self, deadline: Deadline) -> None:
        self._published.renew(deadline)
        self._published.check_settings()
        failures = self._presence.bring_up(self._fleet.engines, deadline)
        if self._presence.is_too_little(failures):
            raise join_error(failures)
        self._note_connected()
        self._fleet.content(deadline)  # its tables and kernels are made here, and not in the first round
        for error in failures.values():
            logger.warning("not connected: %s", str(error))
        current = self._numbers.current()
        for engine in self._fleet.engines:
            if engine.name not in failures:
                try:
                    self._catch_up(engine, current, deadline)
                except RoundFailed as error:
                    if self._settings.require == "all":
                        raise
                    logger.warning("%s was not brought to what the others serve: %s", engine.name, str(error))

    def _note_connected(self) -> None:
        if not self._was_connected:
            self._published.warn_of_rounding()
        self._was_connected = True

    def _add(self, engine: str | EngineClient | SyncEngine, deadline: Deadline) -> Report | None:
        link = EngineLink(make_client(engine, token=self._settings.token, adapter=self._settings.adapter))
        for other in self._fleet.engines:
            if twins([other.client, link.client]):
                if link.client is not other.client:
                    link.client.close()
                raise StateError(
                    f"{link.name} is in the fleet already: it and {other.name} are one engine",
                    hint="connect() brings back an engine that was lost; remove() it to add it anew",
                )
        self._renew_where_let_go(deadline)
        self._published.check_settings()
        current = self._numbers.current()
        self._fleet.engines.append(link)
        try:
            failures = self._presence.bring_up([link], deadline)
            if failures:
                raise join_error(failures)
            return self._catch_up(link, current, deadline)
        except BaseException:  # KeyboardInterrupt, too
            self._remove(link.name)
            raise

    def _remove(self, name: str) -> None:
        engine = self._fleet.find(engine_name(name))
        self._presence.forget(engine)
        self._fleet.remove(engine)
        self._coordinator.wait_goodbyes()

    def _publish(self, deadline: Deadline, waking: Waking | None = None) -> Report:
        if not self._fleet.engines:
            raise StateError("the fleet has no engine", hint="Give engines= or call add()")
        self._look_at_source(deadline)
        timeline = Timeline(self._fleet.progress)
        asleep: dict[str, WeightcastError] = {}
        if waking is not None:
            with timeline.phase("wake"):
                asleep = waking.weights(self._fleet.engines, deadline)
        asked = {engine.name for engine in self._fleet.engines if engine.version == UNKNOWN}
        with timeline.phase("gather"):
            absent = asleep | self._bring_up(asleep, deadline)
            self._refuse_too_little(absent)
            self._note_connected()
            if self._published.follow(lambda: self._published.gather(deadline), deadline):
                absent = asleep | self._bring_up(asleep, deadline)
                self._refuse_too_little(absent)
                self._published.gather(deadline)
            check = self._published.last_check
        engines = [engine for engine in self._fleet.engines if engine.name not in absent]
        counted = self._published.non_finite(deadline, timeline) if self._settings.check_finite else None
        try:
            return self._round(engines, self.next_number(), deadline, timeline, absent, check, counted)
        except RoundFailed as failure:
            if self._source.is_spent or not _is_worth_another(failure, asked):
                raise
            if self._presence.bring_up(engines, deadline, self._presence.patience(deadline)):
                raise
        return self._round(
            engines, self.next_number(), deadline, Timeline(self._fleet.progress), absent, check, counted
        )

    def _look_at_source(self, deadline: Deadline) -> None:
        """Look at the source anew where something may have become of it since the last call."""
        if not self._was_connected:
            self._published.renew(deadline)
            self._published.check_settings()
        elif self._colocated.has_let_go:
            self._renew_where_let_go(deadline)
        elif self._holder.is_new:
            self._published.renew(deadline)
        elif any(engine.broken for engine in self._fleet.engines):
            # Otherwise an engine would be told of what the source has no more.
            self._published.follow(self._source.check_form, deadline)

    def _refuse_too_little(self, absent: dict[str, WeightcastError]) -> None:
        """Raise where the fleet cannot go on without engines that are absent."""
        if self._presence.is_too_little(absent):
            self.records.keep_unconnected(absent)
            if self._was_connected:
                raise not_connected(self._fleet, self.next_number(), absent)
            raise join_error(absent)

    def _bring_up(self, asleep: Mapping[str, WeightcastError], deadline: Deadline) -> dict[str, WeightcastError]:
        """Connect what is not connected, but for engines that could not be woken up: where all have to be there, nothing is tried."""
        if self._presence.is_too_little(dict(asleep)):
            return {}
        engines = [engine for engine in self._fleet.engines if engine.name not in asleep]
        return self._presence.bring_up(engines, deadline, self._presence.patience(deadline))

    def _round(
        self,
        engines: list[EngineLink],
        number: int,
        deadline: Deadline,
        timeline: Timeline,
        absent: dict[str, WeightcastError],
        check: Callable[[], None] = lambda: None,
        non_finite: Mapping[str, int] | None = None,
    ) -> Report:
        self._rounds += 1
        brief = Brief(number, self._rounds, deadline, timeline, absent, check, non_finite)
        attempt = Round(self._fleet, engines, brief)
        try:
            return attempt.run()
        finally:
            if attempt.was_seen:
                self._numbers.use(number)
            self.records.keep(attempt.report())

    def _catch_up(self, engine: EngineLink, current: EngineLink | None, deadline: Deadline) -> Report | None:
        """Bring one engine to what the fleet serves, if the source still has exactly that."""
        if current is None or self._source.layout.is_streamed:
            return None
        if not engine.dirty and (engine.version, engine.digest) == (current.version, current.digest):
            return None
        self._ranks.refresh(deadline)
        number = version_number(current.version)
        check = partial(deadline.check, "the digest of what the source holds")
        digest = self._fleet.content(deadline).of(self._source.memory, check)
        if number < self.next_number() - 1 or f"{digest:016x}" != current.digest:
            return None
        if version_name(number, self._ranks.manifest, digest) != current.version:
            return None
        failures = self._presence.bring_up([engine], deadline)  # alone: what it shares is of no use for this round
        if failures:
            raise failures[engine.name]
        return self._round([engine], number, deadline, Timeline(self._fleet.progress), {})


def _is_worth_another(failure: RoundFailed, asked: set[str]) -> bool:
    """Whether a round failed only because the trainer did not know what had become of engines before it began: one had left, as it does
    before it sleeps, and its goodbye was heard too late; or it had carried out an order of the last round after it, one of ``asked``, had
    said what it serves."""
    return bool(failure.causes) and all(
        (isinstance(cause, WorkerLeft) and not failure.dirty) or (isinstance(cause, BaseMismatch) and name in asked)
        for name, cause in failure.causes.items()
    )
