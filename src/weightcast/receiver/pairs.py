"""Pairs: a worker's pairs of one epoch, one with each trainer rank that has something for the worker.

A round comes over all pairs at once. While a call of the ends runs they can be aborted, and are closed only afterwards: an abort either
comes before the call, and is noticed where the call begins, or finds the ends in use.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

import torch

from weightcast.cuda.wait import own_stream, wait_stream
from weightcast.deadline import Deadline
from weightcast.digest.formula import combine
from weightcast.errors import DeadlineExceeded, PeerLost, PlanMismatch, StateError, TransportError
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest
from weightcast.messages import Message, Read, Setup
from weightcast.plan import Plan, parts_of
from weightcast.receiver.windows import FilledWindows
from weightcast.receiver.worker_round import RoundId, WorkerRound
from weightcast.transports.base import WorkerEnd
from weightcast.transports.registry import registry

logger = logging.getLogger(__name__)

RELEASE_TIMEOUT_S = 10.0
"""An aborted transfer lets go of its ends within a second; more means a transport that breaks its contract."""


class Changes(Enum):
    """Against what a round's changes are told, if they are."""

    NONE = "all values come"
    SINCE_THE_LAST = "the memory holds what the last round brought"
    SINCE_THE_ONE_BEFORE = "the memory holds what the round before the last one brought"


@dataclass(frozen=True, slots=True)
class Pair:
    """The worker's end of the pair with one trainer rank."""

    rank: int
    end: WorkerEnd
    parts: tuple[int, ...]
    """The parts that come over this pair."""
    pulls: bool
    """Whether the end reads memory of the trainer's that this process has mapped."""
    awaits_windows: bool
    """Whether the end reads windows of a stream, each once the trainer has filled it."""

    @contextmanager
    def named(self, is_one_of_several: bool) -> Iterator[None]:
        """Say of an error which trainer rank it is about, where there are several."""
        try:
            yield
        except (TransportError, DeadlineExceeded) as error:
            if is_one_of_several:
                error.message = f"trainer rank {self.rank}: {error.message}"
            raise


class Pairs:
    """Set up anew for each epoch, and used for each round of the epoch. Thread-safe: a thread that aborts does not wait for a thread
    that receives."""

    def __init__(
        self,
        device: torch.device,
        round: WorkerRound,
        tell: Callable[[Message], None],
        why_gone: Callable[[bool], str | None],
    ) -> None:
        """``tell`` sends a message to the trainer. ``why_gone`` says why nothing more can come, and None while something can; its
        argument says whether bytes come only while the trainer lives."""
        self.windows = FilledWindows()
        """Which windows of a stream the trainer has filled."""
        self.has_written = False
        """Whether the last ``receive`` may have written anything."""
        self.num_bytes = 0
        """Bytes received in all rounds so far."""
        self.came = ""
        """How the last round's weights came: bytes, transport and seconds, for the log."""
        self._device, self._round, self._tell, self._why_gone = device, round, tell, why_gone
        self._pairs: list[Pair] = []
        self._former: list[Pair] = []
        """Those of the epoch before, while this epoch's are set up: what both have mapped is not unmapped in between."""
        self._num_ranks = 1
        self._pulls = True
        self._via = ""
        self._free = threading.Condition()
        self._using = 0
        self._entered: list[WorkerEnd] = []
        """Ends that this round was received from."""
        self._was_written = False
        """Whether one of them has written in a part that is through."""

    @property
    def can_repeat(self) -> bool:
        """Whether all that the last round changed is at hand."""
        return all(pair.end.can_repeat for pair in self._pairs)

    @property
    def needs_trainer(self) -> bool:
        """Whether bytes come only while the trainer lives: it sends them, or fills windows with them."""
        return not self._pulls or any(pair.awaits_windows for pair in self._pairs)

    # -- an epoch

    def set_up(self, setup: Setup, plan: Plan, deadline: Deadline, warm_up: Callable[[list[WorkerEnd]], None]) -> None:
        """Make and connect this worker's ends of the pairs that the trainer offers. Raises PlanMismatch where the plan needs others."""
        try:
            self._set_up(setup, plan, deadline, warm_up)
        finally:
            self._close_former()

    def _set_up(self, setup: Setup, plan: Plan, deadline: Deadline, warm_up: Callable[[list[WorkerEnd]], None]) -> None:
        offered = {offer.rank: offer for offer in setup.offers}
        if set(offered) != set(plan):
            raise PlanMismatch(f"the plan needs trainer ranks {sorted(plan)}, offers came from {sorted(offered)}")
        self._pulls, self._num_ranks = True, max(len(plan), 1 + max(plan, default=0))
        self._via = ", ".join(sorted({offered[rank].transport for rank in plan}))
        for rank, copies in plan.items():
            transport = registry().get(offered[rank].transport)
            self._pulls = self._pulls and transport.pulls
            end = transport.worker_end(offered[rank].data, copies)
            awaits_windows = transport.pulls and rank in setup.holdings.streamed
            with self._free:
                self._pairs.append(Pair(rank, end, tuple(parts_of(copies)), transport.pulls, awaits_windows))
        with self._in_use():
            for pair in self._pairs:
                with pair.named(self._num_ranks > 1):
                    pair.end.connect(deadline)
            warm_up([pair.end for pair in self._pairs])

    def abort(self) -> None:
        """End the call of the ends that runs now, if one runs."""
        with self._free:
            if self._using:
                for pair in self._pairs:
                    pair.end.abort()
        self.windows.wake()

    def close(self) -> bool:
        """Close all ends once no call is inside one of them. When a call does not end, return False and leave the ends open."""
        if not self.retire():
            return False
        self._close_former()
        return True

    def _close_former(self) -> None:
        with self._free:
            former, self._former = self._former, []
        for pair in former:
            pair.end.close()

    def retire(self) -> bool:
        """Leave an epoch for the next one, whose ``set_up`` closes the ends of this one that pull. False like ``close``."""
        with self._free:
            if not self._free.wait_for(lambda: not self._using, RELEASE_TIMEOUT_S):
                logger.error("a transfer does not let go of its ends; they stay open")
                return False
            self._entered = []
            pairs, self._pairs = self._pairs, []
            self._former += [pair for pair in pairs if pair.pulls]
        for pair in pairs:
            if not pair.pulls:
                pair.end.close()  # its buffers make room for the next one's
        return True

    # -- a round

    def receive(
        self,
        id: RoundId,
        memory: Memory,
        manifest: Manifest,
        deadline: Deadline,
        changes: Changes = Changes.NONE,
        base: int | None = None,
    ) -> tuple[int, float, int | None]:
        """Receive a round from all trainer ranks at once. Returns the bytes, the seconds, and the digest of what landed, which is None
        where the transports take no digest. StateError once the round is over. ``changes`` says what the memory holds, so that not all
        values need come, and ``base`` is the digest of that, where it is known."""
        start = time.perf_counter()
        self.has_written = False
        with self._in_use(id):
            if not self._pairs:
                raise StateError("no epoch is set up", hint="The trainer has to connect again")
            if len(self._pairs) > 1 and self._device.type == "cuda":
                # The threads' streams know nothing of the engine's work, which may still read what they write.
                wait_stream(self._device, deadline, "the engine's last step")
            self.has_written, self._was_written, self._entered = True, False, []
            try:
                received = self._receive_from_all(id, memory, manifest, deadline, changes)
            except Exception:
                self.has_written = self._was_written or any(end.has_written for end in self._entered)
                raise
        digests = [digest for _, digest in received if digest is not None]
        # Every landing is filled by exactly one copy, so the parts add up to the whole.
        digest = combine(digests) if len(digests) == len(received) else None
        if changes is not Changes.NONE:
            digest = None if digest is None or base is None else combine([base, digest])
        nbytes = sum(nbytes for nbytes, _ in received)
        self.num_bytes += nbytes
        transfer_s = time.perf_counter() - start
        self.came = f"{nbytes} bytes by {self._via} in {transfer_s:.3f} s"
        return nbytes, transfer_s, digest

    def _receive_from_all(
        self, id: RoundId, memory: Memory, manifest: Manifest, deadline: Deadline, changes: Changes
    ) -> list[tuple[int, int | None]]:
        """Bytes and digest of every part of every pair; where changes come, what was added to the digest."""

        def receive_beside(pair: Pair) -> list[tuple[int, int | None]]:
            # A thread's current GPU and stream are its own, too.
            with own_stream(self._device):
                return self._receive_from(pair, id, memory, manifest, deadline, changes)

        if len(self._pairs) == 1:
            return self._receive_from(self._pairs[0], id, memory, manifest, deadline, changes)
        with ThreadPoolExecutor(len(self._pairs)) as pool:
            return [each for some in pool.map(receive_beside, self._pairs) for each in some]

    def _receive_from(
        self, pair: Pair, id: RoundId, memory: Memory, manifest: Manifest, deadline: Deadline, changes: Changes
    ) -> list[tuple[int, int | None]]:
        """All parts that come over one pair, each window of a stream once the trainer says that it is filled."""
        received: list[tuple[int, int | None]] = []
        for part in pair.parts:
            if pair.awaits_windows:
                self._wait_filled(pair, id, part, deadline)
            self._entered.append(pair.end)
            with pair.named(self._num_ranks > 1):
                if changes is not Changes.NONE:
                    is_behind = changes is Changes.SINCE_THE_ONE_BEFORE
                    received.append(pair.end.receive_changes(memory, manifest, deadline, is_behind=is_behind))
                else:
                    received.append(pair.end.receive_proven(memory, manifest, deadline, part))
            self._was_written = self._was_written or pair.end.has_written
            if pair.awaits_windows:
                self._tell_read(pair, id, part)
        return received

    def _wait_filled(self, pair: Pair, id: RoundId, window: int, deadline: Deadline) -> None:
        if pair.end.pipes is None:
            self.windows.wait(id, window, deadline, lambda: self._check_purpose(id))
        else:
            pair.end.pipes.wait(id.round, window, deadline, lambda: self._check_purpose(id))

    def _tell_read(self, pair: Pair, id: RoundId, window: int) -> None:
        if pair.end.pipes is None:
            self._tell(Read(epoch=id.epoch, round=id.round, window=window))
        else:
            pair.end.pipes.tell(id.round, window)

    def _check_purpose(self, id: RoundId | None, needs_trainer: bool = True) -> None:
        """Raise where nothing more comes of a round: it is over, or the trainer is gone, or this worker leaves."""
        if (reason := self._why_gone(needs_trainer)) is not None:
            raise PeerLost(reason)
        if id is not None and self._round.stops(id):
            raise StateError(f"round {id} is over")

    @contextmanager
    def _in_use(self, id: RoundId | None = None) -> Iterator[None]:
        """While a call of the ends runs: see the module's first lines."""
        with self._free:
            self._check_purpose(id, self.needs_trainer)
            self._using += 1
        try:
            yield
        finally:
            with self._free:
                self._using -= 1
                self._free.notify_all()
