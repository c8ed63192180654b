"""Publisher: the trainer's one object. ``publish()`` brings every engine to the next version, or says who serves what."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType

import torch

from weightcast.deadline import Deadline, is_seconds
from weightcast.errors import InvalidInput, StateError, Unsupported
from weightcast.messages import ModeWish
from weightcast.report.model import Report
from weightcast.sources import Rename, Source, SourceLike, Stream, make_source
from weightcast.sources.holder import Holder
from weightcast.sources.streamed import Modes
from weightcast.trainer.clients import EngineClient, SyncEngine, make_clients
from weightcast.trainer.first_rank import Lead
from weightcast.trainer.fleet.addresses import address_beside, address_towards
from weightcast.trainer.fleet.fleet import FleetSettings
from weightcast.trainer.fleet.outcomes import Require
from weightcast.trainer.fleet.places import check_patterns, refuse_idle
from weightcast.trainer.metrics import TrainerMetrics
from weightcast.trainer.ranks import Follower, GivenGroup, Group, check_complete, chosen_group
from weightcast.trainer.turns import Turns, undisturbed
from weightcast.transports.facts import outward_address
from weightcast.untrusted.secret import usable_token

SHARDED_HINT = "Make a Publisher on every rank of the trainer, with process_group="
PAUSES = ("keep", "wait", "abort", "none")


class Publisher:
    """Publishes a module, a state dict, a checkpoint folder or a stream of tensors to engines, all or nothing.

    Args:
        source: what to publish; see trainer.sources.
        engines: URLs of servers, ``LLM`` objects of this process, or EngineClients.
        token: for weight-changing routes of the servers.
        dtype: publish the floating-point tensors of a module or a state dict in this type (float64, float32, float16 or bfloat16): what goes
            live is the value rounded to it, then cast to the engine's type. None: each tensor is published in its own type, and the
            engine's types decide. Integers and float8 tensors stay as they are.
        rename: other names for checkpoint tensors, where engines have them under other prefixes: a mapping of prefixes, such as
            {"model.language_model.": "model."}, of which the longest counts, or a function of a name.
        transport: "auto" or a transport's name.
        mode: "auto", "staged" or "in_place"; an engine's own setting counts before it.
        shadows: staged copies that an engine keeps where its memory has room. With 2 a commit is one copy instead of an
            exchange, which halves the time that requests in flight stand still.
        timeout_s: deadline of ``connect`` and of each ``publish``, all waits in it included.
        pause: what happens to requests in flight while the commit runs: "keep" (frozen, then continued), "wait", "abort" or
            "none" (the engine only makes sure that no step runs meanwhile; as "keep" where caches are cleared or several workers change).
        clear_cache: recompute keys and values of kept requests under the new weights, and forget cached prefixes.
        require: "all": every engine reaches the next version or none does. "live": an engine that fails is dropped from the round
            and the others go on; the report names it, and later rounds try to have it back.
        takeover: leave a trainer that is still connected to an engine when it first joins; without it a second trainer is refused.
        address: where engines reach this process; found by itself when omitted.
        bucket_nbytes: bytes of the pieces that tcp and nccl send, a multiple of 256; two are in flight. None: 8 MiB for tcp,
            256 MiB for nccl.
        silence_s: a worker that is not heard for so long is lost.
        log: file that every round's report is appended to, committed or not; one that cannot be written is no reason to fail.
            Numbers go on from it, also when no engine can be reached that knows the last one.
        unused: patterns (shell-style, on checkpoint names) of tensors that engines may rightly have no use for, such as value heads:
            ["v_head.*"]. Any other tensor without a place in an engine is PlanMismatch; reports list what was left out.
        process_group: the ranks of a distributed trainer, each of which makes a Publisher of its own part of the model (DTensors;
            plain tensors count as replicas). None: this rank alone. "auto", where torch.distributed has several ranks: all of them
            for a source with DTensors over all ranks, for a module that DistributedDataParallel wraps, and for any module under
            accelerate (so under TRL, too); InvalidInput for other sources, which do not tell. ``connect``, ``publish``, ``add`` and ``remove`` are then collective: every rank makes
            the same calls in the same order, and all return the same report or raise the same error. Rank 0 leads; what the
            others give besides source, dtype, rename, timeout_s and address is not looked at.
        metrics_port: serve Prometheus metrics on this port of the loopback interface; 0 chooses one (``metrics_port`` says which).

    One call at a time: a call that comes while another thread makes one is a StateError, but for ``close``. A forked child has the
    module's tensors as memory of its own, and no use of the Publisher: ``close`` does nothing there, other calls are a StateError.
    A context manager: leaving it closes the publisher; engines go on with what they serve.
    """

    @undisturbed()
    def __init__(
        self,
        source: SourceLike,
        engines: Sequence[str | EngineClient | SyncEngine] = (),
        *,
        token: str | None = None,
        dtype: torch.dtype | None = None,
        rename: Rename | None = None,
        transport: str = "auto",
        mode: ModeWish = "auto",
        shadows: int = 1,
        timeout_s: float = 60.0,
        pause: str = "keep",
        clear_cache: bool = True,
        require: Require = "all",
        takeover: bool = False,
        address: str | None = None,
        bucket_nbytes: int | None = None,
        silence_s: float = 5.0,
        log: str | Path | None = None,
        unused: Sequence[str] = (),
        metrics_port: int | None = None,
        process_group: GivenGroup = "auto",
    ) -> None:
        self._timeout_s, self._closed, self._turns = timeout_s, False, Turns()
        chosen = chosen_group(process_group, source)
        group = None if chosen is None else Group(chosen)
        deadline = Deadline(timeout_s)
        try:
            _check_engines(engines)
            _check_choices(pause, mode, shadows, require)
            _check_silence(silence_s)
            patterns = check_patterns(unused)
            token = usable_token(token)
            keeps = group is None or group.rank == 0
            self._holder = Holder(partial(make_source, source, dtype=dtype, rename=rename, keeps=keeps))
            if group is None:
                refuse_idle(patterns, self._source.manifest)
                check_complete(self._source.manifest, {0: self._source.layout}, hint=SHARDED_HINT)
        except Exception as error:
            if group is not None:
                group.meet(deadline, error)
            raise
        one_host = group.meet(deadline) if group is not None else True
        self.metrics_port: int | None = None
        self._part: Lead | Follower
        if group is not None and group.rank > 0:
            # Rank 0's control channel carries everything from here on.
            info = group.introduce(deadline, None)
            self._part = Follower(
                self._holder,
                info,
                rank=group.rank,
                size=group.size,
                address=address or address_beside(info.address) if one_host else outward_address(),
            )
            return
        try:
            clients = make_clients(engines, token=token)
            settings = FleetSettings(
                transport=None if transport == "auto" else transport,
                mode=mode,
                shadows=shadows,
                bucket_nbytes=bucket_nbytes,
                takeover=takeover,
                address=address
                or (address_towards({client.host for client in clients}) if one_host else outward_address()),
                unused=patterns,
                share=require == "all",
            )
            self._part = lead = Lead(
                self._holder,
                clients,
                settings,
                size=1 if group is None else group.size,
                token=token,
                pause=pause,
                clear_cache=clear_cache,
                require=require,
                timeout_s=timeout_s,
                silence_s=silence_s,
                log=log,
            )
        except Exception as error:
            if group is not None:
                group.introduce(deadline, None, error)
            raise
        try:
            if group is not None:
                group.introduce(deadline, lead.join_info())
            if metrics_port is not None:
                self.metrics_port = lead.records.metrics.serve(metrics_port)
        except BaseException:
            self.close()
            raise

    @property
    def _source(self) -> Source:
        return self._holder.source

    # -- life

    def connect(self, timeout_s: float | None = None) -> None:
        """Join all engines and connect all transports; learns what they serve, so that version numbers go on from there.

        Engines that do not serve what the others do, as after a restart, are brought to it beside them if the source still has
        it; otherwise they get the next version. May be called at any time to have lost engines back before the next round, and after
        the source's tensors were moved, replaced or given another form: the source is looked at anew, and engines join again where the
        form is another one. An engine that has no place for it is a PlanMismatch that names tensors.
        Raises the error of an engine that cannot be connected (require="live": when none can); the publisher stays usable, and
        ``publish`` tries again what is not connected.
        """
        with self._turns.take("connect"):
            self._part.connect(self._begin(timeout_s))

    def add(self, engine: str | EngineClient | SyncEngine, timeout_s: float | None = None) -> Report | None:
        """Add an engine to the fleet and connect it; when that fails the fleet is as before.

        If the source still holds the values of the version that the fleet serves, the engine is brought to it at once, beside the
        others, and the report says so. Otherwise (None) it gets the next version with all others.
        """
        with self._turns.take("add"):
            return self._part.add(engine, self._begin(timeout_s))

    def remove(self, name: str) -> None:
        """Dismiss an engine; it goes on with what it serves."""
        with self._turns.take("remove"):
            self._part.remove(name, self._begin(None))

    def close(self) -> None:
        """Leave all engines and free memory, sockets and segments; idempotent. The source's tensors stay valid.

        With several ranks each closes its own, in any order; waits for nobody.
        """
        if not self._closed:
            self._closed = True
            if self._turns.is_child:
                return  # sockets and engines are the parent's
            with torch.inference_mode(False):
                self._part.close(settled=not self._turns.is_taken)

    def __enter__(self) -> Publisher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- publishing

    def prepare(self) -> None:
        """Have the GPU digest now what the next ``publish`` will bring, which takes less by so much: for a trainer that has other
        things to do between its optimizer's step and ``publish``.

        Queues work on the current stream and waits for nothing. Tensors of the source must not change from here until ``publish``
        returns, or the round ends as DigestMismatch. With several ranks each may call it or not. On a CPU, where ``publish``
        digests while bytes travel, and before ``connect`` it does nothing. Raises Unsupported for a source that ``publish`` copies.
        """
        with self._turns.take("prepare"):
            self._require_open()
            if self._source.device.type == "cpu":
                return
            if self._source.is_copied:
                raise Unsupported(
                    "publish() copies the values of this source, there is nothing to prepare",
                    hint="Publish the module itself",
                )
            for digest in self._part.expected.values():
                digest.begin(self._source.memory)

    def publish(self, stream: Stream | None = None, *, timeout_s: float | None = None) -> Report:
        """Bring every engine to the next version, with the values of ``stream`` where the source is a StreamSource and this round's
        iterator is given here.

        When it returns, every engine serves that version, proven by digest (require="live": but those whose report is not
        ``ok``). A publisher that was never connected connects first and raises what ``connect`` does. When it raises
        RoundFailed, every engine serves what ``serving`` says (the version before, or "unknown" for one that cannot be asked) or
        is named in ``dirty``; calling again repairs and repeats. With several ranks, one that is gone or does not come before
        the round begins is PeerLost or DeadlineExceeded on all others, and nothing was changed. It ends at most two seconds after
        its deadline. Tensors of the source must not change while it runs.
        """
        modes = Modes()
        with self._turns.take("publish"):
            deadline = self._begin(timeout_s)
            self._source.open(stream, modes)
            try:
                return self._part.publish(deadline)
            finally:
                # What was prepared counts for one call, whatever came of it.
                for digest in self._part.expected.values():
                    digest.forget()

    @property
    def versions(self) -> dict[str, str]:
        """What each engine serves, as last heard."""
        return self._lead("versions").records.versions()

    @property
    def members(self) -> dict[str, str]:
        """The state of each engine: "ready", "dirty", "unknown" (what it serves could not be asked), or why it is not connected."""
        return self._lead("members").records.members()

    @property
    def metrics(self) -> TrainerMetrics:
        """Prometheus metrics of this publisher: ``render()`` them, or have ``metrics_port=`` serve them."""
        return self._lead("metrics").records.metrics

    @property
    def last_report(self) -> Report | None:
        """The report of the last round that was committed."""
        return self._part.last_report

    @property
    def control_address(self) -> str:
        """The endpoint engines connect back to."""
        return self._lead("control_address").control_address

    # -- pieces

    def _require_open(self) -> None:
        if self._closed:
            raise StateError("the publisher is closed")

    def _begin(self, timeout_s: float | None) -> Deadline:
        """The deadline of a call that begins now."""
        self._require_open()
        return Deadline(self._timeout_s if timeout_s is None else timeout_s)

    def _lead(self, what: str) -> Lead:
        """The part that knows what is asked; only rank 0 of several has it."""
        if isinstance(self._part, Follower):
            raise StateError(f"this rank knows no {what}", hint="Ask trainer rank 0")
        return self._part


def _check_engines(engines: object) -> None:
    # A text is a sequence, too: of letters.
    if isinstance(engines, str):
        raise InvalidInput("engines is a list, not one URL", field="engines", hint="Give [url]")
    if not isinstance(engines, Iterable):
        raise InvalidInput(
            f"engines is a list, not one {type(engines).__name__}", field="engines", hint="Give [engine]"
        )


def _check_choices(pause: str, mode: str, shadows: int, require: str) -> None:
    if pause not in PAUSES:
        raise InvalidInput(f"pause is one of {', '.join(PAUSES)}, not {pause!r}", field="pause")
    if mode not in ("auto", "staged", "in_place"):
        raise InvalidInput(f"mode is auto, staged or in_place, not {mode!r}", field="mode")
    if shadows not in (1, 2):
        raise InvalidInput(f"shadows is 1 or 2, not {shadows!r}", field="shadows")
    if require not in ("all", "live"):
        raise InvalidInput(f"require is all or live, not {require!r}", field="require")


def _check_silence(silence_s: float) -> None:
    if not is_seconds(silence_s) or silence_s > 86400:
        raise InvalidInput(f"silence_s is a number of seconds up to 86400, not {silence_s!r}", field="silence_s")
