"""nixl beside cuda_ipc and tcp: one receive of the same bytes, trainer and worker in two processes of one host. Without a GPU the rows of host memory are measured.

    python benchmarks/gpu/bench_nixl.py [--nbytes 2147483648] [--rounds 5]

Prints a row for each transport and each pair of devices: the fastest round and the median, in milliseconds and GB/s. Bytes are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time

import torch

from weightcast.errors import WeightcastError
from weightcast.testing.ranks import Peer, RankFailed
from weightcast.testing.transport_cases import bulk_case
from weightcast.testing.transport_sides import TrainerSide, WorkerSide, load_transport

TRANSPORTS = {
    "nixl": "weightcast.transports.nixl:NixlTransport",
    "cuda_ipc": "weightcast.transports.cuda_ipc:CudaIpcTransport",
    "shm_cuda": "weightcast.transports.shm_cuda:ShmCudaTransport",
    "shm": "weightcast.transports.shm:ShmTransport",
    "tcp": "weightcast.transports.tcp:TcpTransport",
}
PAIRS = {
    "nixl": [("cuda", "cuda"), ("cpu", "cuda"), ("cuda", "cpu"), ("cpu", "cpu")],
    "cuda_ipc": [("cuda", "cuda")],
    "shm_cuda": [("cpu", "cuda")],
    "shm": [("cpu", "cpu")],
    "tcp": [("cuda", "cuda"), ("cpu", "cuda"), ("cuda", "cpu"), ("cpu", "cpu")],
}


class TimedWorker(WorkerSide):
    """A worker that says how long a receive took and whether the bytes are those of a seed."""

    def timed(self, seed: int) -> tuple[float, bool]:
        began = time.perf_counter()
        self.receive(0, 60.0)
        took_s = time.perf_counter() - began
        return took_s, torch.equal(self._memories[0].storages[0].cpu(), values_of(seed, self._nbytes()))

    def _nbytes(self) -> int:
        return self._memories[0].storages[0].numel()


def values_of(seed: int, nbytes: int) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def measured(transport: str, source: str, target: str, nbytes: int, rounds: int) -> list[float]:
    """Seconds of each round but the first."""
    case, spec = bulk_case(nbytes), TRANSPORTS[transport]
    bucket_nbytes = load_transport(spec).default_bucket_nbytes
    trainer = TrainerSide()
    offer = trainer.open(spec, source, case.copies, case.src_nbytes, bucket_nbytes)
    seconds = []
    with Peer(TimedWorker) as worker, contextlib.closing(trainer):
        worker.call("open", spec, target, offer, case.copies)
        worker.call("make", 0, case.dst_nbytes)
        worker.start("connect", 60.0)
        trainer.connect(60.0)
        worker.result()
        for _ in range(rounds + 1):
            seed = int.from_bytes(os.urandom(4), "little")
            trainer.memory.storages[0].copy_(values_of(seed, nbytes))
            if load_transport(spec).pulls:
                trainer.send(60.0)
                worker.start("timed", seed)
            else:
                worker.start("timed", seed)
                trainer.send(60.0)
            took_s, is_right = worker.result()
            assert is_right, f"{transport} {source} to {target}: other bytes"
            seconds.append(took_s)
        worker.call("close")
    return seconds[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nbytes", type=int, default=2**31)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--transports", nargs="*", default=list(TRANSPORTS))
    args = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    print(f"| transport | from | to | fastest, ms | median, ms | GB/s (median) |   {args.nbytes / 2**20:.0f} MiB")
    print("|---|---|---|---|---|---|")
    for transport in args.transports:
        for source, target in PAIRS[transport]:
            if not has_gpu and "cuda" in (source, target):
                continue
            try:
                seconds = measured(transport, source, target, args.nbytes, args.rounds)
            except (WeightcastError, RankFailed) as error:
                print(f"| {transport} | {source} | {target} | {type(error).__name__}: {str(error)[:120]} |")
                continue
            median = statistics.median(seconds)
            print(
                f"| {transport} | {source} | {target} | {1e3 * min(seconds):.1f} | {1e3 * median:.1f} "
                f"| {args.nbytes / median / 1e9:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
