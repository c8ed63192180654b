"""Trainer on one GPU, engine on another of the same host: publish() over cuda_ipc (peer access) and nccl, beside the plain copy.

python benchmarks/gpu/bench_two_gpus.py [--shapes 0.6B 8B] [--rounds 9]
"""

from __future__ import annotations

import argparse
import os
from unittest import mock

import torch
from bench_publish import Policy, measure
from common import Table, gpu_ms
from shapes import SHAPES

from weightcast.testing.peer_engine import PeerEngine


def plain_copy(table: Table, policy: Policy, name: str) -> float:
    """torch's copy of the same tensors between the two GPUs, within one process."""
    values = [value.data for value in policy.values]
    copies = [torch.empty_like(value, device="cuda:1") for value in values]

    def run() -> None:
        for there, here in zip(copies, values, strict=True):
            there.copy_(here, non_blocking=True)

    milliseconds = gpu_ms(run, 5)
    table.add(f"{name}: copy_ of {len(values)} tensors to the other GPU", milliseconds, sum(v.nbytes for v in values))
    return milliseconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--shapes", nargs="+", default=["0.6B", "8B"], choices=list(SHAPES))
    options = parser.parse_args()
    if torch.cuda.device_count() < 2:
        raise SystemExit("needs two GPUs")
    table = Table("two GPUs")
    # The engine's first GPU is the second one; it sees both, as a worker that maps its trainer's memory has to.
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES="1,0"):
        engine = PeerEngine(shares_gpu=False)
    with engine:
        for name in options.shapes:
            policy = Policy(name, torch.bfloat16)
            plain_ms = plain_copy(table, policy, name)
            torch.cuda.empty_cache()
            for transport in ("cuda_ipc", "nccl"):
                for way in ("in place", "staged"):
                    try:
                        measure(table, engine, policy, name, way, transport, options.rounds, plain_ms)
                    except Exception as error:  # noqa: BLE001 - the other rows are still worth having
                        table.fail(f"{name} {transport} {way}", error)
            del policy
            torch.cuda.empty_cache()
    table.save()
    table.exit()


if __name__ == "__main__":
    main()
