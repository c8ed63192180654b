"""nccl transfers against raw NCCL on the same link, everything in turns: two and three ranks, over NVLink where there are two GPUs.

With one GPU all ranks share it and NCCL goes through the loopback interface; with more, two ranks have one each. Every round
measures each contender once, so that what the machine does meanwhile hits all of them; rows are medians, and the ratio to the
raw broadcast of the same bytes is that of medians.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import torch
from common import Table

from weightcast.cuda.nccl import Communicator, new_unique_id
from weightcast.deadline import Deadline
from weightcast.layout.memory import Memory
from weightcast.plan import Copy, split
from weightcast.testing.ports import free_port
from weightcast.testing.ranks import Peer
from weightcast.testing.transport_cases import bulk_case
from weightcast.transports.base import TrainerEnd, WorkerEnd
from weightcast.transports.nccl import NcclTransport

MIB = 2**20
NBYTES = (1024 if torch.cuda.device_count() < 2 else 8192) * MIB
ROUNDS = 11
COPIES = tuple(split(bulk_case(NBYTES).copies, 16 * MIB))
"""As tensors of 16 MiB."""


class Rank:
    """One process: contenders by name, each something to run once."""

    def sit(self, rank: int, gpu: int | None) -> None:
        """Take a GPU of its own, or share the first one as a host of its own."""
        self.rank = rank
        if gpu is None:
            os.environ["NCCL_HOSTID"] = f"bench-{os.getpid()}"
        else:
            torch.cuda.set_device(gpu)
        os.environ["NCCL_SOCKET_IFNAME"] = "lo"
        self.device = torch.device("cuda", gpu or 0)
        self.buffer = torch.randint(0, 256, (NBYTES,), dtype=torch.uint8, device=self.device)
        self.contenders: dict[str, Callable[[], object]] = {}
        self.ends: dict[str, Sequence[TrainerEnd] | WorkerEnd] = {}
        self.comms: dict[str, Communicator] = {}

    def new_id(self) -> bytes:
        return new_unique_id()

    def join(self, name: str, unique_id: bytes, world_size: int, chunk: int) -> None:
        """A raw broadcast in pieces."""
        comm = self.comms[name] = Communicator(self.device)
        comm.connect(unique_id, self.rank, world_size, Deadline(60))

        def run() -> None:
            for part in self.buffer.split(chunk):
                comm.broadcast(part, 0, Deadline(60))
            comm.finish(Deadline(60), "broadcast")

        self.contenders[name] = run

    def offer(self, name: str, groups: list[tuple[int, tuple[Copy, ...]]], bucket_nbytes: int) -> list[bytes]:
        """The trainer's ends for groups of so many workers that want these copies."""
        transport, memory = NcclTransport(), Memory([self.buffer])
        ends = [
            end
            for count, copies in groups
            for end in transport.trainer_ends(count, copies, memory, bucket_nbytes=bucket_nbytes)
        ]
        self.ends[name] = ends
        pool = ThreadPoolExecutor(len(ends))
        self.contenders[name] = lambda: list(pool.map(lambda end: end.send(Deadline(60)), ends))
        return [end.offer() for end in ends]

    def accept(self, name: str, offer: bytes, copies: tuple[Copy, ...]) -> None:
        end = self.ends[name] = NcclTransport().worker_end(offer, copies)
        memory = Memory([self.buffer])
        self.contenders[name] = lambda: end.receive(memory, Deadline(60))

    def connect(self, name: str) -> float:
        """Milliseconds until the pairs are connected."""
        ends = self.ends[name]
        start = time.perf_counter()
        if isinstance(ends, WorkerEnd):
            ends.connect(Deadline(60))
        else:
            with ThreadPoolExecutor(len(ends)) as pool:
                list(pool.map(lambda end: end.connect(Deadline(60)), ends))
        return (time.perf_counter() - start) * 1e3

    def join_vllm(self, name: str, port: int, buffer_nbytes: int) -> None:
        """vLLM's own group of two, and its packed path; the receiver's loader does nothing."""
        from vllm.distributed.weight_transfer import packed_tensor
        from vllm.distributed.weight_transfer.nccl_common import stateless_init_process_group

        group = stateless_init_process_group("127.0.0.1", port, self.rank, 2, self.device)
        parts = self.buffer.split(16 * MIB)
        common = {"group": group, "src": 0, "buffer_size_bytes": buffer_nbytes, "num_buffers": 2}

        def run() -> None:
            if self.rank == 0:
                named = ((str(number), part) for number, part in enumerate(parts))
                packed_tensor.packed_nccl_broadcast_producer(named, post_iter_func=lambda item: item[1], **common)
            else:
                known = ((str(number), (part.shape, part.dtype)) for number, part in enumerate(parts))
                packed_tensor.packed_nccl_broadcast_consumer(
                    known, post_unpack_func=lambda tensors: None, device=self.buffer.device, **common
                )
            torch.cuda.synchronize()

        self.contenders[name] = run

    def run(self, name: str) -> float:
        """Milliseconds of one transfer."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        self.contenders[name]()
        return (time.perf_counter() - start) * 1e3

    def digest(self) -> int:
        from weightcast.cuda.digest import digest_words

        return digest_words(self.buffer.view(torch.int64), 0)

    def forget(self) -> None:
        """Close everything."""
        for ends in self.ends.values():
            for end in [ends] if isinstance(ends, WorkerEnd) else ends:
                end.close()
        self.ends.clear()
        self.contenders.clear()

    def leave(self, name: str) -> float:
        """Milliseconds of an abort."""
        start = time.perf_counter()
        self.comms.pop(name).abort()
        return (time.perf_counter() - start) * 1e3


def all_call(ranks: Sequence[Peer], method: str, *args: object) -> list[float]:
    for rank in ranks:
        rank.start(method, *args)
    return [rank.result(120) for rank in ranks]


def open_raw(ranks: Sequence[Peer], name: str, chunk: int) -> None:
    all_call(ranks, "join", name, ranks[0].call("new_id"), len(ranks), chunk)


def open_ours(
    ranks: Sequence[Peer], name: str, groups: list[tuple[int, tuple[Copy, ...]]], bucket_nbytes: int
) -> float:
    """The slowest side's milliseconds to connect."""
    trainer, *workers = ranks
    offers = trainer.call("offer", name, groups, bucket_nbytes)
    wanted = [copies for count, copies in groups for _ in range(count)]
    for worker, offer, copies in zip(workers, offers, wanted, strict=True):
        worker.call("accept", name, offer, copies)
    return max(all_call(ranks, "connect", name))


def take_turns(table: Table, ranks: Sequence[Peer], notes: dict[str, str], raw: str) -> None:
    """Rows of all contenders; the first two rounds are not counted."""
    times: dict[str, list[float]] = {name: [] for name in notes}
    for _ in range(ROUNDS + 2):
        for name, found in times.items():
            found.append(max(all_call(ranks, "run", name)))
    medians = {name: statistics.median(found[2:]) for name, found in times.items()}
    for name, note in notes.items():
        ratio = f"{medians[raw] / medians[name]:.3f} of the raw broadcast's rate"
        spread = f"{min(times[name][2:]):.1f} to {max(times[name][2:]):.1f}"
        table.add(f"{len(ranks)} ranks, {name}", medians[name], NBYTES, f"{ratio}; {spread}; {note}")


def two(table: Table, ranks: Sequence[Peer]) -> None:
    notes: dict[str, str] = {}
    raw = "raw broadcast, 64 MiB"
    for chunk in (64 * MIB, 256 * MIB, NBYTES):
        name = f"raw broadcast, {chunk // MIB} MiB"
        open_raw(ranks, name, chunk)
        notes[name] = ""
    for bucket in (16 * MIB, 64 * MIB, 256 * MIB):
        name = f"ours, {bucket // MIB} MiB"
        notes[name] = f"connect {open_ours(ranks, name, [(1, COPIES)], bucket):.0f} ms"
    if find_spec("vllm") is not None:
        for nbytes in (64 * MIB, 1024 * MIB):
            port = free_port()
            name = f"vLLM's packed path, {nbytes // MIB} MiB"
            all_call(ranks, "join_vllm", name, port, nbytes)
            notes[name] = ""
    take_turns(table, ranks, notes, raw)
    assert len({rank.call("digest") for rank in ranks}) == 1, "what arrived is not what was sent"
    all_call(ranks, "forget")
    table.add("abort of a communicator", max(all_call(ranks, "leave", raw)), 0)


def three(table: Table, ranks: Sequence[Peer]) -> None:
    raw = "raw broadcast, 64 MiB"
    open_raw(ranks, raw, 64 * MIB)
    notes = {raw: ""}
    halves = [COPIES[: len(COPIES) // 2], COPIES[len(COPIES) // 2 :]]
    for name, groups in (
        ("both want all, one communicator", [(2, COPIES)]),
        ("both want all, one each", [(1, COPIES)] * 2),
        ("each wants a half, one each", [(1, half) for half in halves]),
    ):
        notes[name] = f"connect {open_ours(ranks, name, groups, 64 * MIB):.0f} ms"
    take_turns(table, ranks, notes, raw)
    assert len({rank.call("digest") for rank in ranks}) == 1, "what arrived is not what was sent"
    all_call(ranks, "forget")


def main() -> None:
    gpus = torch.cuda.device_count()
    table = Table("nccl" if gpus < 2 else "nvlink")
    with Peer(Rank, 0) as first, Peer(Rank, 1) as second, Peer(Rank, 2) as third:
        ranks = [first, second, third][: 3 if gpus != 2 else 2]
        for number, rank in enumerate(ranks):
            rank.call("sit", number, number if gpus >= len(ranks) else None, timeout_s=60)
        two(table, ranks[:2])
        if len(ranks) > 2:
            three(table, ranks)
    table.save()


if __name__ == "__main__":
    main()
