"""Publisher: the trainer's one object. ``publish()`` brings every engine to the next version, or says who serves what."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Literal, Unpack, overload

import torch

from weightcast.deadline import Deadline
from weightcast.errors import InvalidInput, StateError, Unsupported
from weightcast.plan import Holdings
from weightcast.report.model import Report
from weightcast.sources import Rename, Source, SourceLike, Stream, make_source
from weightcast.sources.adapter import adapter_named
from weightcast.sources.holder import Holder
from weightcast.sources.streamed import Modes
from weightcast.trainer.clients import EngineClient, SyncEngine, make_clients
from weightcast.trainer.clients.making import check_engines
from weightcast.trainer.first_rank import FirstRank
from weightcast.trainer.fleet.addresses import address_beside, address_towards
from weightcast.trainer.fleet.places import refuse_idle
from weightcast.trainer.metrics import TrainerMetrics
from weightcast.trainer.publishing import Publishing
from weightcast.trainer.ranks import GivenGroup, Meeting, OtherRank, check_complete, chosen_group
from weightcast.trainer.settings import Settings, SettingsGiven
from weightcast.trainer.turns import Turns, undisturbed
from weightcast.transports.facts import outward_address

SHARDED_HINT = "Make a Publisher on every rank of the trainer, with process_group="


class Publisher:
    """Publishes a module, a state dict, a checkpoint folder or a stream of tensors to engines, all or nothing.

    Args:
        source: the weights to publish: a module, a mapping of names to tensors, a folder of safetensors, a stream, or a Source. Several
            modules, or several mappings, are published as one by a mapping of prefixes to them: {"": model, "draft.": draft} brings the
            model that an engine speculates with to the same version in the same commit.
        engines: URLs of servers, ``LLM`` objects of this process, or EngineClients.
        dtype: the type in which floating-point tensors of a module or a state dict are published (float64, float32, float16 or
            bfloat16). Each value is rounded to this type and then cast to the engine's type. None: each tensor is published in its own
            type and cast to the engine's. Integers and float8 tensors stay as they are.
        rename: other names for checkpoint tensors, for engines that have the tensors under other prefixes: a mapping of prefixes, such
            as {"model.language_model.": "model."}, of which the longest that fits counts, or a function of a name.
        process_group: the ranks of a distributed trainer, each of which makes a Publisher of its own part of the model (DTensors;
            plain tensors count as replicas). None: this rank alone. "auto", where torch.distributed has several ranks: all of them
            for a source with DTensors over all ranks, for a module that DistributedDataParallel wraps, and for any module under
            accelerate (so under TRL, too). Any other source does not tell its ranks and is InvalidInput. ``connect``, ``publish``,
            ``add`` and ``remove`` are then collective: every rank makes the same calls in the same order, and all ranks return the same
            report or raise the same error. Rank 0 leads; of the other ranks only source, dtype, rename, timeout_s and address count.
        settings: ``token``, ``timeout_s``, ``mode``, ``require`` and the other keywords that ``weightcast.trainer.settings.Settings``
            explains.

    Only one thread may call at a time: a second call is a StateError, except for ``close``, which any thread may call at any time. A forked child has the module's tensors as
    memory of its own and cannot use the Publisher: ``close`` does nothing there, and other calls are a StateError.
    A Publisher is a context manager: leaving the context closes the Publisher, and engines go on serving their version.
    """

    @undisturbed()
    def __init__(
        self,
        source: SourceLike,
        engines: Sequence[str | EngineClient | SyncEngine] = (),
        *,
        dtype: torch.dtype | None = None,
        rename: Rename | None = None,
        process_group: GivenGroup = "auto",
        **settings: Unpack[SettingsGiven],
    ) -> None:
        self._turns = Turns()
        self._publishing: Publishing | None = None
        """The last round that was begun without waiting."""
        self.metrics_port: int | None = None
        chosen = chosen_group(process_group, source)
        meeting = None if chosen is None else Meeting(chosen)
        deadline = Deadline(Settings().timeout_s)
        try:
            self._settings = Settings(**settings)
            deadline = Deadline(self._settings.timeout_s)
            check_engines(engines)
            keeps = meeting is None or meeting.rank == 0
            adapter = self._settings.adapter
            # Whatever the model has later, the same adapter is published.
            adapter = adapter if adapter is None else adapter_named(source, adapter)
            self._holder = Holder(
                partial(make_source, source, dtype=dtype, rename=rename, keeps=keeps, adapter=adapter),
                lets_go=isinstance(source, torch.nn.Module | Mapping),
            )
            if meeting is None:
                refuse_idle(self._settings.unused, self._source.manifest)
                held = Holdings.of(self._source.manifest, {0: self._source.layout})
                check_complete(held, hint=SHARDED_HINT)
        except Exception as error:
            if meeting is not None:
                meeting.meet(deadline, error)
            raise
        one_host = meeting.meet(deadline) if meeting is not None else True
        self._part: FirstRank | OtherRank
        if meeting is not None and meeting.rank > 0:
            self._part = self._follow(meeting, one_host, deadline)
        else:
            self._part = self._lead(engines, meeting, one_host, deadline)
        self._dropped = weakref.finalize(self, _leave, self._part, os.getpid())

    def _follow(self, meeting: Meeting, one_host: bool, deadline: Deadline) -> OtherRank:
        """This rank's part where it is not rank 0, whose control channel carries everything from here on."""
        info = meeting.introduce(deadline, None)
        nearest = address_beside(info.address) if one_host else outward_address()
        address = self._settings.address or nearest
        return OtherRank(self._holder, info, rank=meeting.rank, size=meeting.size, address=address)

    def _lead(
        self,
        engines: Sequence[str | EngineClient | SyncEngine],
        meeting: Meeting | None,
        one_host: bool,
        deadline: Deadline,
    ) -> FirstRank:
        """Rank 0's part; other ranks learn how to reach it, or why it could not be made."""
        first: FirstRank | None = None
        try:
            clients = make_clients(engines, token=self._settings.token, adapter=self._settings.adapter)
            nearest = address_towards({client.host for client in clients}) if one_host else outward_address()
            settings = replace(self._settings, address=self._settings.address or nearest)
            first = FirstRank(self._holder, clients, settings, size=1 if meeting is None else meeting.size)
            if settings.metrics_port is not None:
                self.metrics_port = first.records.metrics.serve(settings.metrics_port)
        except BaseException as error:
            if first is not None:
                first.close(settled=True)
            if meeting is not None and isinstance(error, Exception):
                meeting.introduce(deadline, None, error)
            raise
        if meeting is not None:
            try:
                meeting.introduce(deadline, first.join_info())
            except BaseException:
                first.close(settled=True)
                raise
        return first

    @property
    def _source(self) -> Source:
        return self._holder.source

    # -- life

    def connect(self, timeout_s: float | None = None, *, wait_s: float | None = None) -> None:
        """Have all engines join, connect all transports, and learn which version each engine serves; version numbers go on from there.

        An engine that serves another version than the fleet, as after a restart, is brought to the fleet's version if the source still
        holds that version; otherwise the engine gets the next version. ``connect`` may be called at any time: to have lost engines back
        before the next round, and after the source's tensors were moved, replaced or given another form. The source is then read
        anew, and engines join again where the form changed. An engine that has no place for a tensor is a PlanMismatch that names tensors.
        With ``wait_s`` a server that is not there yet, or still loads its model, is waited for, up to so many seconds, before
        ``timeout_s`` counts. Raises the error of an engine that cannot be connected (require="live": when none can); the publisher stays usable, and
        ``publish`` tries again what is not connected.
        """
        with self._turns.take("connect"):
            self._part.connect(self._begin(timeout_s, wait_s), wait_s or 0.0)

    def add(
        self, engine: str | EngineClient | SyncEngine, timeout_s: float | None = None, *, wait_s: float | None = None
    ) -> Report | None:
        """Add an engine to the fleet and connect the engine. When that fails the fleet is as before. ``wait_s`` is that of ``connect``.

        If the source still holds the version that the fleet serves, the engine is brought to that version at once, without touching the
        other engines, and the report of that round is returned. Otherwise the result is None, and the engine gets the next version
        together with the others.
        """
        with self._turns.take("add"):
            return self._part.add(engine, self._begin(timeout_s, wait_s), wait_s or 0.0)

    def remove(self, name: str) -> None:
        """Dismiss an engine; the engine goes on serving its version."""
        if not isinstance(name, str):
            raise InvalidInput(
                f"an engine is removed by its name, not by {name!r}",
                field="name",
                hint="Give its URL, or a name of members",
            )
        with self._turns.take("remove"):
            self._part.remove(name, self._begin(None))

    def close(self) -> None:
        """Leave all engines and free memory and sockets. A second call does nothing. The source's tensors stay valid. A round that was
        begun with ``wait=False`` is waited for; leaving the context with an error calls it off. A call that runs is called off, takes its
        round back and raises. Where ``close`` comes from within that call, as from a signal's handler, or on the event loop that an engine
        runs on, which the round needs, ``close`` returns at once, and the call or round closes on its way out.

        With several ranks each rank closes its own Publisher, in any order; no rank waits for another.
        """
        self._turns.end(self._close, waits=not self._would_hold_up_an_engine())

    def _would_hold_up_an_engine(self) -> bool:
        """Whether an engine, and with it a round, stands still while this thread waits."""
        try:
            self._part.check_caller()
        except StateError:
            return True
        return False

    def _close(self, *, settled: bool) -> None:
        """``settled``: no call runs."""
        beside = self._publishing
        if beside is not None and not beside.done and self._would_hold_up_an_engine():
            beside.when_over(partial(self._close, settled=settled))
            return
        if not self._dropped.detach():
            return  # the process ends, and all engines were left
        try:
            if self._publishing is not None:
                self._publishing.close()
        finally:
            settled = settled and (self._publishing is None or self._publishing.done)
            with torch.inference_mode(False):
                try:
                    self._part.close(settled=settled)
                finally:
                    if settled:
                        self._holder.give_up()

    def __enter__(self) -> Publisher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._publishing is not None and not self._turns.is_child:
            self._publishing.cancel()
        self.close()

    # -- publishing

    def prepare(self) -> None:
        """Have the GPU digest the new weights now, so that the next ``publish`` takes less time. Call ``prepare`` right behind the
        optimizer's step, when the trainer has other work to do before ``publish``.

        ``prepare`` queues work on the current stream and waits for nothing. Tensors of the source must not change until ``publish``
        returns, or the round ends as DigestMismatch. With several ranks each rank may call ``prepare`` or not. ``prepare`` does nothing
        on a CPU, where ``publish`` digests while bytes travel, and before ``connect``. Raises Unsupported for a source that ``publish``
        copies.
        """
        with self._turns.take("prepare"):
            self._begin(None)
            if self._source.device.type == "cpu":
                return
            if self._source.is_copied:
                raise Unsupported(
                    "publish() copies or computes the values of this source, there is nothing to prepare",
                    hint="Leave prepare() out, or publish a module without adapters, whose tensors are read where they lie",
                )
            for digest in self._part.expected.values():
                digest.begin(self._source.memory)

    @overload
    def publish(
        self,
        stream: Stream | None = None,
        *,
        wait: Literal[True] = True,
        timeout_s: float | None = None,
        wake: bool = False,
        release: Callable[[], object] | None = None,
    ) -> Report: ...

    @overload
    def publish(self, *, wait: Literal[False], timeout_s: float | None = None) -> Publishing: ...

    def publish(
        self,
        stream: Stream | None = None,
        *,
        wait: bool = True,
        timeout_s: float | None = None,
        wake: bool = False,
        release: Callable[[], object] | None = None,
    ) -> Report | Publishing:
        """Bring every engine to the next version, with the values of ``stream`` where the source is a StreamSource and this round's
        iterator is given here.

        Args:
            wait: False: take a snapshot of the values, have the round go on beside the trainer, and return a ``Publishing`` at once, whose
                ``wait`` returns the report or raises the error. The tensors may change as soon as the call returns. The snapshot is
                kept for later rounds: on the GPU where the GPU has room, else in host memory. The next call of this Publisher waits
                for the round first. Not for streams, and not together with ``wake``.
            timeout_s: deadline of this call, and of a round that nobody waits for; None: the publisher's.
            wake: for vLLM engines that sleep, as in colocated loops: wake their weights up, publish, have the engines give up all
                that they hold of this trainer, call ``release`` on all ranks, and then wake the rest (keys and values) up in engines
                that serve the new version. Unsupported by name where an engine cannot sleep. WakeFailed says that the version is
                live, and what still sleeps.
            release: frees the trainer's own memory, as by moving the model to the host and emptying torch's cache. Nothing here
                refers to the module's memory meanwhile, and the next call takes the module up where it is by then. Each rank gives
                its own; keys and values wake when those of all ranks have returned.

        When ``publish`` returns, every engine serves that version, proven by digest; with require="live", every engine whose report is
        ``ok``. A publisher that is not connected connects first and raises the errors of ``connect``. When ``publish`` raises
        RoundFailed, ``RoundFailed.serving`` says which version each engine serves ("unknown" for an engine that cannot be asked), and
        ``RoundFailed.dirty`` names engines that hold weights of no version; the next ``publish`` repairs them. With several ranks, a
        rank that is gone, or that does not call before the round begins, is PeerLost or DeadlineExceeded on all other ranks, and
        nothing was changed. ``publish`` ends at most two seconds after its deadline. Tensors of the source must not change while
        ``publish`` runs.
        """
        modes, began = Modes(), time.monotonic()
        with self._turns.take("publish"):
            deadline = self._begin(timeout_s)
            if not wait:
                _refuse_beside(stream, wake=wake, release=release)
                return self._publish_beside(deadline, began)
            if release is not None and not (wake and callable(release)):
                raise InvalidInput("release is a function, called where wake=True", field="release")
            self._source.open(stream, modes)
            return self._publish(deadline, wake=wake, release=release)

    def _publish(
        self,
        deadline: Deadline,
        *,
        wake: bool = False,
        release: Callable[[], object] | None = None,
        failure: Exception | None = None,
    ) -> Report:
        try:
            return self._part.publish(deadline, wake=wake, release=release, failure=failure)
        finally:
            # What was prepared counts for one call, whatever came of it.
            for digest in self._part.expected.values():
                digest.forget()

    def _publish_beside(self, deadline: Deadline, began: float) -> Publishing:
        """Take a snapshot, and have the round begin on a thread of its own."""
        alone, failure = isinstance(self._part, FirstRank) and self._part.alone, None
        try:
            self._holder.take(deadline, alone=alone)
        except Exception as error:
            if alone:
                raise
            failure = error  # the other ranks have made the call, too: they are told
        source, holder, publish = self._source, self._holder, self._publish
        held_s = source.held_s = time.monotonic() - began

        def run() -> Report:
            try:
                return publish(deadline, failure=failure)
            finally:
                holder.put_down()

        self._publishing = Publishing(run, deadline, source.device, held_s, self._part.check_caller)
        self._publishing.start()
        return self._publishing

    @property
    def versions(self) -> dict[str, str]:
        """The version that each engine serves, by the engine's name, as last heard."""
        return self._first_rank("versions").records.versions()

    @property
    def members(self) -> dict[str, str]:
        """The state of each engine: "ready", "dirty", "unknown" (the engine could not be asked), or the reason why it is not connected."""
        return self._first_rank("members").records.members()

    @property
    def metrics(self) -> TrainerMetrics:
        """Prometheus metrics of this publisher: ``render()`` them, or have ``metrics_port=`` serve them."""
        return self._first_rank("metrics").records.metrics

    @property
    def last_report(self) -> Report | None:
        """The report of the last round that was committed."""
        return self._part.last_report

    @property
    def control_address(self) -> str:
        """The endpoint engines connect back to."""
        return self._first_rank("control_address").control_address

    # -- pieces

    def _begin(self, timeout_s: float | None, wait_s: float | None = None) -> Deadline:
        """The deadline of a call that begins now, after a wait for engines. A round that was begun without waiting is over then."""
        own = Deadline(self._settings.timeout_s if timeout_s is None else timeout_s)
        deadline = own if wait_s is None else Deadline(own.timeout_s + Deadline(wait_s).timeout_s)
        self._turns.call_off_by(deadline)
        if self._publishing is not None:
            self._publishing.settle(deadline)
            self._publishing = None
        self._holder.put_down()  # what a call took that was interrupted before its round began
        return deadline

    def _first_rank(self, what: str) -> FirstRank:
        """The part that knows what is asked; only rank 0 of several has it."""
        if isinstance(self._part, OtherRank):
            raise StateError(f"this rank knows no {what}", hint="Ask trainer rank 0")
        return self._part


def _refuse_beside(stream: Stream | None, *, wake: bool, release: object) -> None:
    for name, value in (("stream", stream), ("wake", wake or None), ("release", release)):
        if value is not None:
            raise InvalidInput(f"{name} and wait=False exclude each other", field=name, hint="Leave wait=False out")


def _leave(part: FirstRank | OtherRank, pid: int) -> None:
    """What a Publisher that nobody closed leaves open ends with it: its control channel, whose engines are told. The source's memory is
    not touched, since a training step may run."""
    if os.getpid() == pid:
        part.leave()
