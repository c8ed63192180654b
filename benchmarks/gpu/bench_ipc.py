"""cuda_ipc between two processes: a whole receive() against the plain foreach copy of the same bytes in one process."""

from __future__ import annotations

import gc
import time

import torch
from common import Table, gpu_ms, random_memory, wall_ms
from shapes import SHAPES, layouts

from weightcast.content.layout_digest import LayoutDigest
from weightcast.cuda.wait import DeviceWait
from weightcast.deadline import Deadline
from weightcast.layout.memory import Memory
from weightcast.plan import compile_plan
from weightcast.testing.ranks import Peer
from weightcast.transports.cuda_ipc import CudaIpcTransport

ROWS = (("0.6B", "bfloat16"), ("0.6B", "float32"), ("8B", "bfloat16"), ("8B", "float32"), ("MoE", "bfloat16"))
"""Shapes, and the type of the trainer's weights; the engine's are bfloat16."""


class Trainer:
    """The exporting process."""

    def open(self, name: str, dtype: str) -> tuple[bytes, int]:
        self.manifest, held, wanted = layouts(SHAPES[name], dtype)
        if dtype == "float32":
            self.memory = Memory([torch.randn(n // 4, device="cuda").view(torch.uint8) for n in held.storage_nbytes])
        else:
            self.memory = random_memory(held.storage_nbytes)
        plan = compile_plan(self.manifest, {0: held}, wanted)[0]
        self.end = CudaIpcTransport().trainer_end(plan, self.memory)
        digest = LayoutDigest(self.manifest, held).of(self.memory) if dtype == "bfloat16" else 0
        return self.end.offer(), digest

    def connect(self) -> None:
        self.end.connect(Deadline(60))

    def send_ms(self) -> dict[str, float]:
        """The wait for an idle device, and an interprocess event in its place."""
        event, device_wait = torch.cuda.Event(interprocess=True), DeviceWait(torch.device("cuda"))
        return {
            "send()": wall_ms(lambda: self.end.send(Deadline(10)), 50),
            "synchronize": wall_ms(torch.cuda.synchronize, 50),
            "in a thread": wall_ms(lambda: device_wait.wait(Deadline(10), "x"), 50),
            "interprocess event.record": wall_ms(event.record, 50),
        }

    def close(self) -> None:
        """Give everything back, the end that keeps the memory alive included."""
        self.end.close()
        del self.end
        self.memory = Memory([])
        gc.collect()
        torch.cuda.empty_cache()


def free_gb() -> float:
    """What the GPU has free for anybody."""
    return torch.cuda.mem_get_info()[0] / 1e9


def measure(table: Table, trainer: Peer, name: str, dtype: str) -> None:
    offer, digest = trainer.call("open", name, dtype, timeout_s=120)
    manifest, held, wanted = layouts(SHAPES[name], dtype)
    plan = compile_plan(manifest, {0: held}, wanted)[0]
    memory = Memory([torch.zeros(n, dtype=torch.uint8, device="cuda") for n in wanted.storage_nbytes])
    free = {"before connect": free_gb()}
    end = CudaIpcTransport().worker_end(offer, plan)
    trainer.start("connect")
    start = time.perf_counter()
    end.connect(Deadline(60))
    trainer.result()
    connect_ms = (time.perf_counter() - start) * 1e3
    start = time.perf_counter()
    end.receive(memory, Deadline(60))
    first_ms = (time.perf_counter() - start) * 1e3
    label = f"{name} {dtype}"
    table.add(
        f"{label}: receive()",
        wall_ms(lambda: end.receive(memory, Deadline(60))),
        memory.nbytes,
        f"connect {connect_ms:.1f} ms, first {first_ms:.1f} ms",
    )
    if digest:
        ours = LayoutDigest(manifest, wanted)
        assert ours.of(memory) == digest, "what arrived is not what was published"
        table.add(f"{label}: digest", wall_ms(lambda: ours.of(memory)), memory.nbytes)
    if dtype == "float32":
        print("send:", trainer.call("send_ms"), flush=True)
    free["while mapped"] = free_gb()
    end.close()
    free["after close"] = free_gb()
    trainer.call("close")
    free["after the trainer freed its own"] = free_gb()
    print(f"{label}: GB free {', '.join(f'{when} {gb:.2f}' for when, gb in free.items())}", flush=True)
    if dtype == "bfloat16" and memory.nbytes < 2**34:
        copy = [storage.clone() for storage in memory.storages]
        plain = lambda: torch._foreach_copy_(copy, list(memory.storages))  # noqa: E731
        table.add(f"{label}: foreach of the fused parameters", gpu_ms(plain), memory.nbytes, "same process")


def main() -> None:
    table = Table("ipc")
    with Peer(Trainer) as trainer:
        for name, dtype in ROWS:
            measure(table, trainer, name, dtype)
            torch.cuda.empty_cache()
    table.save()


if __name__ == "__main__":
    main()
