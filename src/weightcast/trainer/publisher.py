"""Publisher: the trainer's one object. ``publish()`` brings every engine to the next version, or says who serves what."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import torch

from weightcast.control.coordinator import Coordinator
from weightcast.deadline import Deadline
from weightcast.errors import InvalidInput, RoundFailed, StateError, WeightcastError
from weightcast.messages import ModeWish
from weightcast.report.model import Report
from weightcast.trainer.clients import EngineClient, SyncEngine, make_client
from weightcast.trainer.fleet import EngineLink, Fleet, FleetSettings
from weightcast.trainer.rounds import Round
from weightcast.trainer.sources import SourceLike, make_source
from weightcast.trainer.timeline import Timeline
from weightcast.transports.base import DEFAULT_BUCKET_NBYTES

logger = logging.getLogger(__name__)

PAUSES = ("keep", "wait", "abort", "none")


class Publisher:
    """Publishes a module, a state dict or a checkpoint folder to engines, all or nothing.

    Args:
        source: what to publish; see trainer.sources.
        engines: URLs of servers, ``LLM`` objects of this process, or EngineClients.
        token: for weight-changing routes of the servers.
        dtype: publish floating-point tensors in this type.
        transport: "auto" or a transport's name.
        mode: "auto", "staged" or "in_place"; an engine's own setting counts before it.
        timeout_s: deadline of ``connect`` and of each ``publish``, all waits in it included.
        pause: what happens to requests in flight while the commit runs: "keep" (frozen, then continued), "wait", "abort" or
            "none" (the engine only makes sure that no step runs meanwhile).
        clear_cache: recompute keys and values of kept requests under the new weights, and forget cached prefixes.
        takeover: leave a trainer that is still connected to an engine; without it a second trainer is refused.
        address: where engines reach this process; found by itself when omitted.
        silence_s: a worker that is not heard for so long is lost.

    Not thread-safe. A context manager: leaving it closes the publisher; engines go on with what they serve.
    """

    def __init__(
        self,
        source: SourceLike,
        engines: Sequence[str | EngineClient | SyncEngine] = (),
        *,
        token: str | None = None,
        dtype: torch.dtype | None = None,
        transport: str = "auto",
        mode: ModeWish = "auto",
        timeout_s: float = 60.0,
        pause: str = "keep",
        clear_cache: bool = True,
        takeover: bool = False,
        address: str | None = None,
        bucket_nbytes: int = DEFAULT_BUCKET_NBYTES,
        silence_s: float = 5.0,
    ) -> None:
        if pause not in PAUSES:
            raise InvalidInput(f"pause is one of {', '.join(PAUSES)}, not {pause!r}", field="pause")
        if mode not in ("auto", "staged", "in_place"):
            raise InvalidInput(f"mode is auto, staged or in_place, not {mode!r}", field="mode")
        Deadline(timeout_s)
        self._token, self._timeout_s, self._pause, self._clear_cache = token, timeout_s, pause, clear_cache
        self._source = make_source(source, dtype=dtype)
        clients = [make_client(engine, token=token) for engine in engines]
        self._address = address or _address_towards(clients)
        self._coordinator = Coordinator(self._address, silence_s=silence_s)
        settings = FleetSettings(
            transport=None if transport == "auto" else transport,
            mode=mode,
            bucket_nbytes=bucket_nbytes,
            takeover=takeover,
            address=self._address,
        )
        self._fleet = Fleet(self._source, self._coordinator, settings)
        self._fleet.engines = [EngineLink(client) for client in clients]
        self._number = 0
        self._rounds = 0
        self._closed = False
        self.last_report: Report | None = None

    # -- life

    def connect(self, timeout_s: float | None = None) -> None:
        """Join all engines and connect all transports. Raises the first engine's error; the publisher stays usable, and
        ``publish`` tries again what is not connected."""
        self._require_open()
        deadline = Deadline(timeout_s or self._timeout_s)
        self._bring_up(deadline, require_all=True)

    def add(self, engine: str | EngineClient | SyncEngine, timeout_s: float | None = None) -> None:
        """Add an engine to the fleet and connect it. It serves version n+1 after the next ``publish``."""
        self._require_open()
        link = EngineLink(make_client(engine, token=self._token))
        if any(other.name == link.name for other in self._fleet.engines):
            raise StateError(f"{link.name} is in the fleet already")
        self._fleet.engines.append(link)
        self._bring_up(Deadline(timeout_s or self._timeout_s), require_all=False, only=[link])

    def remove(self, name: str) -> None:
        """Dismiss an engine; it goes on with what it serves."""
        self._fleet.remove(self._fleet.find(name))

    def close(self) -> None:
        """Leave all engines and free memory, sockets and segments; idempotent. The source's tensors stay valid."""
        if not self._closed:
            self._closed = True
            self._fleet.close()
            self._coordinator.close()
            self._source.close()

    def __enter__(self) -> Publisher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- publishing

    def publish(self, timeout_s: float | None = None) -> Report:
        """Bring every engine to the next version.

        When it returns, every engine serves that version, proven by digest. When it raises RoundFailed, every engine serves
        what ``serving`` says (the version before) or is named in ``dirty``; calling again repairs and repeats. Tensors of the
        source must not change while it runs.
        """
        self._require_open()
        if not self._fleet.engines:
            raise StateError("the fleet has no engine", hint="Give engines= or call add()")
        deadline = Deadline(timeout_s or self._timeout_s)
        timeline = Timeline()
        self._rounds += 1
        with timeline.phase("prepare"):
            self._bring_up(deadline, require_all=True)
            self._source.refresh()
        engines = self._fleet.engines
        number = max([self._number, *(_number_of(engine.version) for engine in engines)]) + 1
        attempt = Round(
            self._fleet,
            engines,
            self._source,
            self._fleet.content(),
            self._coordinator,
            number=number,
            round=self._rounds,
            base=engines[0].version,
            pause=self._pause,
            clear_cache=self._clear_cache,
            deadline=deadline,
            timeline=timeline,
        )
        report = attempt.run()
        self._number = number
        self.last_report = report
        logger.info("%s", report)
        return report

    @property
    def versions(self) -> dict[str, str]:
        """What each engine serves, as last heard."""
        return {engine.name: engine.version for engine in self._fleet.engines}

    @property
    def control_address(self) -> str:
        """The endpoint engines connect back to."""
        return f"tcp://{self._address}:{self._coordinator.port}"

    # -- pieces

    def _require_open(self) -> None:
        if self._closed:
            raise StateError("the publisher is closed")

    def _bring_up(self, deadline: Deadline, *, require_all: bool, only: list[EngineLink] | None = None) -> None:
        """Admit and set up whatever is not connected; RoundFailed (or the one engine's error) when that fails."""
        engines = only if only is not None else self._fleet.engines
        for engine in engines:
            if engine.joined and engine.lost():
                engine.joined, engine.broken = False, engine.lost()
        absent = [engine for engine in engines if not engine.joined]
        failures: dict[str, WeightcastError] = {}
        if absent:
            with ThreadPoolExecutor(len(absent)) as pool:
                futures = {engine.name: pool.submit(self._fleet.admit, engine, deadline) for engine in absent}
            for name, future in futures.items():
                error = future.exception()
                if isinstance(error, WeightcastError):
                    failures[name] = error
                elif error is not None:
                    raise error
        while not failures and (broken := [e for e in engines if e.joined and e.broken is not None]):
            try:
                self._fleet.set_up(broken, deadline)
            except WeightcastError as error:
                failures[error.engine or "trainer"] = error
        if failures and (require_all or only is not None):
            if len(failures) == 1:
                raise next(iter(failures.values()))
            raise RoundFailed(
                "engines could not be connected",
                phase="join",
                round=self._rounds,
                causes=failures,
                serving={engine.name: engine.version for engine in engines if not engine.dirty},
                dirty=tuple(engine.name for engine in engines if engine.dirty),
            )


def _number_of(version: str) -> int:
    """The number in a version name; 0 for a label that is none."""
    head = version.partition("-")[0]
    return int(head) if head.isascii() and head.isdigit() else 0


def _address_towards(clients: Sequence[EngineClient]) -> str:
    """The address of this host on the way to the engines; loopback when all are here."""
    hosts = {client.host for client in clients}
    for host in sorted(hosts):
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((host, 9))
                address = str(probe.getsockname()[0])
        except OSError:
            continue
        if not address.startswith("127."):
            return address
    return "127.0.0.1"
