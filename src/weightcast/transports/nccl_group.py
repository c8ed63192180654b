"""The trainer's side of a nccl group: one communicator that a trainer rank has with all workers that want the same of it.

Each worker of the group has an end of its own. What the ends have to do together, such as a broadcast, is done once by one of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import msgspec

from weightcast.cuda.lanes import Lanes
from weightcast.cuda.nccl import ABORT_S, PROMPT_ABORT_S, Communicator, new_unique_id
from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, StateError, TransportError, WeightcastError
from weightcast.layout.memory import Memory
from weightcast.plan import Copy, nbytes_of, parts_of
from weightcast.transports.base import TrainerEnd
from weightcast.transports.buckets import into_bucket
from weightcast.transports.guard import EndGuard
from weightcast.transports.nccl_cut import TRAINER, NcclOffer, cuts_of, device_of, lanes_for, parts_in_buckets
from weightcast.transports.pairlink import PairLink
from weightcast.transports.rendezvous import Listener
from weightcast.transports.together import Blamed, Together

_STEP_S = 0.02


class Group:
    """The trainer's side of one communicator: packs and sends for all workers of the group at once."""

    def __init__(self, count: int, copies: Sequence[Copy], memory: Memory, bucket_nbytes: int, address: str) -> None:
        self._device = device_of(memory, [copy.src_storage for copy in copies])
        self._parts = parts_in_buckets(copies, bucket_nbytes)
        lanes = lanes_for(self._parts, self._device)
        self._lanes: Lanes | None = lanes
        self._packers = {
            part: [
                lanes.packer(number, list(map(into_bucket, bucket.pieces)), memory)
                for number, bucket in enumerate(buckets)
            ]
            for part, buckets in self._parts.items()
        }
        self._together = Together(count)
        self._num_broadcasts = 0
        self._in_use = set(range(count))
        self._comm = Communicator(self._device, self._check)
        self.nbytes = {part: nbytes_of(some) for part, some in parts_of(copies).items()}
        self.ends: list[NcclTrainerEnd] = []
        self._unique_id = new_unique_id()
        try:
            for member in range(count):
                self.ends.append(self._new_end(member, count, bucket_nbytes, address))
        except BaseException:
            for end in self.ends:
                end.close()
            raise

    def _new_end(self, member: int, count: int, bucket_nbytes: int, address: str) -> NcclTrainerEnd:
        """The end of one member, which listens for its worker."""
        guard = EndGuard("the trainer's end of a nccl pair")
        listener = Listener(address, guard)
        offer = NcclOffer(
            unique_id=self._unique_id,
            rank=member + 1,
            world_size=count + 1,
            bucket_nbytes=bucket_nbytes,
            cuts=cuts_of(self._parts),
            address=address,
            port=listener.port,
            secret=listener.secret,
        )
        return NcclTrainerEnd(self, member, guard, listener, offer)

    def connect(self, member: int, deadline: Deadline) -> None:
        """Meet all workers; every member's end calls it once its worker's connection is there."""

        def meet() -> None:
            self._comm.connect(self._unique_id, TRAINER, len(self.ends) + 1, deadline)

        self._together.do(member, "connect", deadline, meet, self.ends[member].check)

    def send(self, member: int, deadline: Deadline, part: int) -> None:
        """One part of a round for the whole group; every member's end calls it."""
        self._together.do(member, "send", deadline, lambda: self._send(deadline, part), self.ends[member].check)

    def fail(self, error: BaseException, member: int) -> None:
        """End everything for all members, because of one; the workers learn it from their connections."""
        self._together.fail(error, member)
        self._hang_up(PROMPT_ABORT_S)

    def close(self, member: int) -> None:
        """End it for all members; the last one to close frees the buffers. Idempotent."""
        self._together.fail(TransportError("an end of the group was closed"), member)
        self._hang_up(ABORT_S)
        self._in_use.discard(member)
        if not self._in_use:
            self._packers, self._lanes = {}, None

    def _send(self, deadline: Deadline, part: int) -> None:
        comm, lanes = self._comm, self._lanes
        if lanes is None:
            raise StateError("the group was closed")
        before = self._num_broadcasts
        after = before + len(self._parts[part])
        try:
            self._wait_for_workers(min(before + 1, after), deadline)
            self._broadcast(comm, lanes, deadline, part)
            # What NCCL keeps in its own buffers is sent for the trainer, while a late worker may still hold up those behind it.
            self._wait_for_workers(after, deadline)
        except DeadlineExceeded as error:
            member = self._latest()
            if member is None:
                raise
            late = DeadlineExceeded(f"the worker did not receive in time: {error.message}")
            raise Blamed(member, late) from error
        self._num_broadcasts = after

    def _broadcast(self, comm: Communicator, lanes: Lanes, deadline: Deadline, part: int) -> None:
        with lanes.beside():
            for number, (bucket, packer) in enumerate(zip(self._parts[part], self._packers[part], strict=True)):
                if (former := lanes.take(number, lanes.side)) is not None:
                    comm.wait(former, deadline, "sending weights")
                packer.run()
                comm.stream.wait_stream(lanes.side)
                comm.broadcast(lanes.buffer(number)[: bucket.nbytes], TRAINER, deadline)
                lanes.mark(number, comm.stream)
            comm.finish(deadline, "sending weights")

    def _wait_for_workers(self, launched: int, deadline: Deadline) -> None:
        """Return when all workers have come to so many broadcasts, in all rounds."""
        absent = list(self.ends)
        while absent := [end for end in absent if end.num_launched() < launched]:
            self._check()
            deadline.check("waiting for a worker to receive")
            PairLink.wait_any(
                [end.link for end in absent if end.link is not None], min(_STEP_S, deadline.remaining_s())
            )

    def _latest(self) -> int | None:
        """The worker that came to fewer broadcasts than any other, which NCCL does not tell; None where that is not one."""
        launched = sorted((end.num_launched(), end.member) for end in self.ends)
        return None if len(launched) > 1 and launched[0][0] == launched[1][0] else launched[0][1]

    def _check(self) -> None:
        """During every wait for NCCL: raises for the member whose worker is gone or whose end was aborted."""
        for end in self.ends:
            try:
                end.check()
            except WeightcastError as error:
                raise Blamed(end.member, error) from error

    def _hang_up(self, wait_s: float) -> None:
        for end in self.ends:
            end.hang_up()
        self._comm.abort(wait_s)


class NcclTrainerEnd(TrainerEnd):
    """One worker's place in a group."""

    def __init__(self, group: Group, member: int, guard: EndGuard, listener: Listener, offer: NcclOffer) -> None:
        self._group, self.member = group, member
        self._guard, self._listener, self._offer = guard, listener, offer
        self.link: PairLink | None = None

    def offer(self) -> bytes:
        return msgspec.msgpack.encode(self._offer)

    def connect(self, deadline: Deadline) -> None:
        with self._use("connect", deadline):
            self.link = PairLink.accept_from(self._listener, deadline)
            self._listener.close()
            self._group.connect(self.member, deadline)

    def send(self, deadline: Deadline, part: int = 0) -> int:
        with self._use("send", deadline):
            if self.link is None:
                raise StateError("a round before connect")
            self._group.send(self.member, deadline, part)
            return self._group.nbytes[part]

    def abort(self) -> None:
        self._guard.abort()

    def close(self) -> None:
        self._guard.close()
        self._listener.close()
        self._group.close(self.member)

    def check(self) -> None:
        """Raise when the end was aborted, or its worker is gone."""
        self._guard.check()
        if self.link is not None:
            self.link.check()

    def num_launched(self) -> int:
        """Broadcasts that the worker has come to, in all rounds."""
        return self.link.num_calls() if self.link is not None else 0

    def hang_up(self) -> None:
        """Let the worker know that nothing comes any more."""
        if self.link is not None:
            self.link.close()

    @contextlib.contextmanager
    def _use(self, what: str, deadline: Deadline) -> Iterator[None]:
        """Around each use; a failure ends it for the whole group at once."""
        try:
            with self._guard.use(what, deadline):
                yield
        except BaseException as error:
            self._group.fail(error, self.member)
            raise
