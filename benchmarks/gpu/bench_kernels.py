"""Digest, copy and swap kernels against the memory of the GPU that they run on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from common import Table, gpu_ms, random_memory, wall_ms
from shapes import SHAPES, layouts

from weightcast.content import proven_on_gpu as cuda_proven
from weightcast.content.layout_digest import LayoutDigest
from weightcast.cuda import digest as cuda_digest
from weightcast.cuda import runs as cuda_runs
from weightcast.cuda.replay import CudaReplay
from weightcast.layout import Layout, Placement
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest
from weightcast.plan import Copy, compile_plan
from weightcast.plan.replay import Replay
from weightcast.receiver.swap import Swap


def device_copy(table: Table) -> None:
    a, b = random_memory([2**32]).storages[0], torch.empty(2**32, dtype=torch.uint8, device="cuda")
    table.add("copy_ of 4.3 GB (payload)", gpu_ms(lambda: b.copy_(a)), a.numel())
    runs = cuda_runs.CopyRuns([(a.data_ptr(), b.data_ptr(), a.numel())], a.device)
    table.add("CopyRuns of the same, one run", gpu_ms(runs.run), a.numel())


def digest(table: Table, name: str, memory: Memory, compiled: LayoutDigest, sweep: bool) -> None:
    nbytes = memory.nbytes
    value = compiled.of(memory)
    table.add(f"digest {name} ({len(compiled.runs)} runs), kernel", gpu_ms(lambda: compiled.start(memory)), nbytes)
    table.add(f"digest {name}, of() with the wait", wall_ms(lambda: compiled.of(memory)), nbytes)
    if not sweep:
        return
    kept = cuda_digest.TILE_BLOCKS, cuda_digest.CHUNK_WORDS, cuda_digest.NUM_WARPS
    for blocks in (2, 4, 8):
        for chunk, warps in ((512, 4), (1024, 4), (1024, 8), (2048, 8)):
            cuda_digest.TILE_BLOCKS, cuda_digest.CHUNK_WORDS, cuda_digest.NUM_WARPS = blocks, chunk, warps
            cuda_digest.TILE_NBYTES = blocks * 32768
            variant = cuda_digest.RunDigest(compiled.runs, memory.storages)
            assert variant.total() == value
            table.add(f"  {blocks=} {chunk=} {warps=}", gpu_ms(variant.start), nbytes)
    cuda_digest.TILE_BLOCKS, cuda_digest.CHUNK_WORDS, cuda_digest.NUM_WARPS = kept
    cuda_digest.TILE_NBYTES = kept[0] * 32768


def copies(table: Table, name: str, sweep: bool) -> None:
    """The plan of a fused engine, one process: every way to replay it; then digest and swap of the result."""
    manifest, held, wanted = layouts(SHAPES[name])
    src = random_memory(held.storage_nbytes)
    dst = Memory([torch.zeros(n, dtype=torch.uint8, device="cuda") for n in wanted.storage_nbytes])
    plan = compile_plan(manifest, {0: held}, wanted)[0]
    nbytes = src.nbytes
    plain, fused = Replay(plan, src, dst), CudaReplay(plan, src, dst, torch.device("cuda", 0))
    table.add(f"{name}: foreach of {len(plain)} pairs", gpu_ms(plain.run), nbytes)
    pairs = list(zip(plain._dst, plain._src, strict=True))
    table.add(f"{name}: loop of copy_", gpu_ms(lambda: [a.copy_(b) for a, b in pairs]), nbytes)
    table.add(f"{name}: CudaReplay, kernel", gpu_ms(fused.run), nbytes)
    if sweep:
        kept = cuda_runs.COPY_TILE_NBYTES, cuda_runs.COPY_CHUNK_WORDS, cuda_runs.COPY_WARPS
        for tile, chunk, warps in (
            (32768, 1024, 4),
            (32768, 2048, 8),
            (65536, 1024, 4),
            (65536, 4096, 8),
            (131072, 2048, 8),
            (131072, 1024, 4),
        ):
            cuda_runs.COPY_TILE_NBYTES, cuda_runs.COPY_CHUNK_WORDS, cuda_runs.COPY_WARPS = tile, chunk, warps
            variant = CudaReplay(plan, src, dst, torch.device("cuda", 0))
            table.add(f"  {tile=} {chunk=} {warps=}", gpu_ms(variant.run), nbytes)
        cuda_runs.COPY_TILE_NBYTES, cuda_runs.COPY_CHUNK_WORDS, cuda_runs.COPY_WARPS = kept
    theirs, ours = LayoutDigest(manifest, held), LayoutDigest(manifest, wanted)
    assert theirs.of(src) == ours.of(dst), "the copies are wrong"
    both(table, name, (plan, src, dst, manifest), ours, sweep or name == "8B")
    digest(table, f"{name} trainer's side", src, theirs, sweep)
    digest(table, f"{name} engine's side", dst, ours, False)
    if name != "MoE":
        shadow = Memory([storage.clone() for storage in dst.storages])
        swap = Swap(list(zip(dst.storages, shadow.storages, strict=True)))
        table.add(f"{name}: swap on the GPU ({len(dst.storages)} pairs), one side counted", gpu_ms(swap.run), nbytes)
        if sweep:
            swaps(table, swap)


def both(
    table: Table, name: str, compiled: tuple[Sequence[Copy], Memory, Memory, Manifest], ours: LayoutDigest, sweep: bool
) -> None:
    """Copy and digest in one pass."""
    plan, src, dst, manifest = compiled
    nbytes, device = src.nbytes, torch.device("cuda", 0)
    for storage in dst.storages:
        storage.random_(0, 256)
    proven = cuda_proven.ProvenReplay(plan, src, dst, manifest, device)
    proven.run()
    assert proven.total() == ours.of(dst) == LayoutDigest(manifest, ours_layout(plan, src)).of(src)
    table.add(f"{name}: copy and digest in one kernel", gpu_ms(proven.run), nbytes)
    kept = cuda_proven.TILE_BLOCKS, cuda_proven.CHUNK_WORDS, cuda_proven.NUM_WARPS
    for blocks, chunk, warps in ((1, 1024, 4), (1, 4096, 8), (1, 2048, 4), (2, 2048, 8), (4, 2048, 8)) if sweep else ():
        cuda_proven.TILE_BLOCKS, cuda_proven.CHUNK_WORDS, cuda_proven.NUM_WARPS = blocks, chunk, warps
        variant = cuda_proven.ProvenReplay(plan, src, dst, manifest, device)
        table.add(f"  {blocks=} {chunk=} {warps=}", gpu_ms(variant.run), nbytes)
        assert variant.total() == proven.total()
    cuda_proven.TILE_BLOCKS, cuda_proven.CHUNK_WORDS, cuda_proven.NUM_WARPS = kept


def ours_layout(plan: Sequence[Copy], src: Memory) -> Layout:
    """The trainer's side of a plan."""
    placements = tuple(
        Placement(
            region=copy.region,
            dtype=copy.src_dtype,
            storage=copy.src_storage,
            offset=copy.src_offset,
            strides=copy.src_strides,
        )
        for copy in plan
    )
    return Layout(placements=placements, storage_nbytes=tuple(storage.numel() for storage in src.storages))


def swaps(table: Table, swap: Swap) -> None:
    kept = cuda_runs.SWAP_CHUNK_WORDS, cuda_runs.SWAP_WARPS
    for chunk, warps in ((512, 4), (1024, 4), (1024, 8), (2048, 4), (4096, 8)):
        cuda_runs.SWAP_CHUNK_WORDS, cuda_runs.SWAP_WARPS = chunk, warps
        table.add(f"  {chunk=} {warps=}", gpu_ms(swap.run), swap.nbytes)
    cuda_runs.SWAP_CHUNK_WORDS, cuda_runs.SWAP_WARPS = kept


def casts(table: Table, name: str) -> None:
    manifest, held, wanted = layouts(SHAPES[name], "float32")
    src = Memory([torch.randn(n // 4, device="cuda").view(torch.uint8) for n in held.storage_nbytes])
    dst = Memory([torch.zeros(n, dtype=torch.uint8, device="cuda") for n in wanted.storage_nbytes])
    plan = compile_plan(manifest, {0: held}, wanted)[0]
    fused = CudaReplay(plan, src, dst, torch.device("cuda", 0))
    nbytes = src.nbytes + dst.nbytes
    table.add(f"{name} from fp32 master weights", gpu_ms(fused.run), nbytes, "bytes read + written")


def host_swap(table: Table) -> None:
    nbytes = 4 * 2**30
    live, host = random_memory([nbytes]).storages[0], torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    table.add("pinned: host to GPU alone", gpu_ms(lambda: live.copy_(host, non_blocking=True), 3, 1), nbytes)
    table.add("pinned: swap with the GPU", gpu_ms(Swap([(live, host)]).run, 3, 1), nbytes, "each direction")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sweep", action="store_true")
    sweep = parser.parse_args().sweep
    table = Table("kernels")
    device_copy(table)
    for name in SHAPES:
        torch.cuda.empty_cache()
        copies(table, name, sweep and name != "0.6B")
    for name in ("0.6B", "8B"):
        torch.cuda.empty_cache()
        casts(table, name)
    torch.cuda.empty_cache()
    host_swap(table)
    table.save()


if __name__ == "__main__":
    main()
