"""The nccl pair against raw NCCL on the same link: two ranks on one GPU, over loopback."""

from __future__ import annotations

import os
import socket
from importlib.util import find_spec

import torch
from common import Table, wall_ms

from weightcast.cuda.nccl import Communicator, new_unique_id
from weightcast.deadline import Deadline
from weightcast.memory import Memory
from weightcast.testing.ranks import Peer
from weightcast.testing.transport_cases import bulk_case
from weightcast.transports.nccl import NcclTransport

NBYTES = 1024 * 2**20
ROUNDS = 3


class Rank:
    """One process: raw sends and broadcasts, or one end of a pair."""

    def __init__(self) -> None:
        os.environ["NCCL_HOSTID"] = f"bench-{os.getpid()}"
        os.environ["NCCL_SOCKET_IFNAME"] = "lo"
        self.buffer = torch.randint(0, 256, (NBYTES,), dtype=torch.uint8, device="cuda")

    def new_id(self) -> bytes:
        return new_unique_id()

    def join(self, unique_id: bytes, rank: int, world_size: int) -> None:
        self.rank = rank
        self.comm = Communicator(torch.device("cuda", 0))
        self.comm.connect(unique_id, rank, world_size, Deadline(60))

    def raw(self, chunk: int) -> float:
        """Median milliseconds of NBYTES by send/recv in chunks."""

        def run() -> None:
            for part in self.buffer.split(chunk):
                if self.rank == 0:
                    self.comm.send(part, 1, Deadline(60))
                else:
                    self.comm.recv(part, 0, Deadline(60))
            self.comm.finish(Deadline(60), "raw")

        return wall_ms(run, ROUNDS, 1)

    def broadcast(self, chunk: int) -> float:
        def run() -> None:
            for part in self.buffer.split(chunk):
                self.comm.broadcast(part, 0, Deadline(60))
            self.comm.finish(Deadline(60), "broadcast")

        return wall_ms(run, ROUNDS, 1)

    def leave(self) -> float:
        return wall_ms(self.comm.abort, 1, 0)

    def offer(self, bucket_nbytes: int) -> bytes:
        case = bulk_case(NBYTES)
        self.end = NcclTransport().trainer_end(case.copies, Memory([self.buffer]), bucket_nbytes=bucket_nbytes)
        return self.end.offer()

    def accept(self, offer: bytes) -> None:
        self.end = NcclTransport().worker_end(offer, bulk_case(NBYTES).copies)

    def connect(self) -> float:
        return wall_ms(lambda: self.end.connect(Deadline(60)), 1, 0)

    def transfer(self) -> float:
        memory = Memory([self.buffer])
        step = getattr(self.end, "send", None) or (lambda deadline: self.end.receive(memory, deadline))
        return wall_ms(lambda: step(Deadline(60)), ROUNDS, 1)

    def close(self) -> None:
        self.end.close()

    def join_vllm(self, port: int, rank: int) -> None:
        """vLLM's own group of two."""
        from vllm.distributed.weight_transfer.nccl_common import stateless_init_process_group

        self.rank = rank
        self.group = stateless_init_process_group("127.0.0.1", port, rank, 2, torch.device("cuda", 0))

    def vllm_packed(self, buffer_nbytes: int) -> float:
        """NBYTES in tensors of 16 MiB through vLLM's packed path; the receiver's loader does nothing."""
        from vllm.distributed.weight_transfer import packed_tensor

        parts = self.buffer.split(16 * 2**20)
        common = {"group": self.group, "src": 0, "buffer_size_bytes": buffer_nbytes, "num_buffers": 2}

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

        return wall_ms(run, ROUNDS, 1)


def both(ranks: list[Peer], method: str, *args: object) -> float:
    for rank in ranks:
        rank.start(method, *args)
    return float(max(rank.result(120) for rank in ranks))


def main() -> None:
    table = Table("nccl")
    with Peer(Rank, 0) as first, Peer(Rank, 1) as second, Peer(Rank, 2) as third:
        for world in ([first, second], [first, second, third]):
            unique_id = first.call("new_id")
            for number, rank in enumerate(world):
                rank.start("join", unique_id, number, len(world))
            for rank in world:
                rank.result(60)
            table.add(f"raw broadcast, {len(world)} ranks, 64 MiB", both(world, "broadcast", 64 * 2**20), NBYTES)
            if len(world) == 2:
                table.add("raw broadcast, 2 ranks, 1 GiB at once", both(world, "broadcast", NBYTES), NBYTES)
                table.add("raw send/recv, 64 MiB", both(world, "raw", 64 * 2**20), NBYTES)
                table.add("raw send/recv, 1 GiB at once", both(world, "raw", NBYTES), NBYTES)
            table.add(f"abort of {len(world)} ranks", both(world, "leave"), 0)
        for bucket_nbytes in (16 * 2**20, 64 * 2**20, 256 * 2**20):
            second.call("accept", first.call("offer", bucket_nbytes))
            connect_ms = both([first, second], "connect")
            ms = both([first, second], "transfer")
            table.add(f"nccl pair, buckets of {bucket_nbytes >> 20} MiB", ms, NBYTES, f"connect {connect_ms:.0f} ms")
            for rank in (first, second):
                rank.call("close")
        if find_spec("vllm") is not None:
            vllm_rows(table, first, second)
    table.save()


def vllm_rows(table: Table, first: Peer, second: Peer) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for number, rank in enumerate((first, second)):
        rank.start("join_vllm", port, number)
    for rank in (first, second):
        rank.result(90)
    for nbytes in (64 * 2**20, 2**30):
        milliseconds = both([first, second], "vllm_packed", nbytes)
        table.add(f"vLLM's packed path, buffers of {nbytes >> 20} MiB", milliseconds, NBYTES)


if __name__ == "__main__":
    main()
