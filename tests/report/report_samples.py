"""Reports with fresh random values for tests."""

from __future__ import annotations

import random

from weightcast.report import EngineReport, Phase, Report, WorkerReport


def make_report(
    rng: random.Random, *, number: int | None = None, num_workers: int = 1, matching: bool = True
) -> Report:
    digest = f"{rng.getrandbits(64):016x}"
    number = number if number is not None else rng.randrange(1, 999)
    phases, at = [], 0.0
    for name in ("announce", "transfer", "verify", "commit"):
        seconds = rng.uniform(1e-4, 1e-2)
        phases.append(Phase(name=name, start_s=at, seconds=seconds))
        at += seconds
    workers = tuple(
        WorkerReport(
            rank=rank,
            transport="shm",
            reason="shm (first choice)",
            nbytes=rng.randrange(1, 10**9),
            seconds=rng.random(),
            digest=digest if matching else f"{rng.getrandbits(64):016x}",
        )
        for rank in range(num_workers)
    )
    engine = EngineReport(
        name="http://127.0.0.1:1", kind="http", version=f"{number}-x", ok=True, phases=tuple(phases), workers=workers
    )
    return Report(
        version=f"{number}-{digest[:12]}",
        number=number,
        epoch=rng.randrange(9),
        round=rng.randrange(99),
        digest=digest,
        mode="staged",
        nbytes=sum(worker.nbytes for worker in workers),
        total_s=at,
        at=rng.uniform(1e9, 2e9),
        outcome="committed",
        phases=tuple(phases),
        engines=(engine,),
    )
