"""How long does the trainer stand still for publish(wait=False)? A module on a GPU, over cuda_ipc, beside rounds that are waited for.

"call": until publish() has returned; "still": until the GPU has done what the trainer queued right behind the call, which waits for
the copy of the weights; "round": until the engine serves them. The copy alone is one read and one write of all weights.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from bench_publish import Policy
from common import Table, gpu_ms
from shapes import SHAPES, layouts

from weightcast import Publisher
from weightcast.sources import ModuleSource
from weightcast.testing.peer_engine import PeerEngine


def copy_alone_ms(policy: Policy) -> float:
    values = [value.data for value in policy.values]
    copies = [torch.empty_like(value) for value in values]
    return gpu_ms(lambda: torch._foreach_copy_(copies, values))


def measure(table: Table, name: str, mode: str, rounds: int) -> None:
    policy = Policy(name, torch.bfloat16)
    _, _, wanted = layouts(SHAPES[name])
    nbytes = sum(value.nbytes for value in policy.values)
    copy_ms = copy_alone_ms(policy)
    torch.cuda.empty_cache()
    with PeerEngine() as engine:
        engine.store(wanted, device="cuda", mode=mode)
        source = ModuleSource(policy, names=policy.names)
        with Publisher(source, [engine], transport="cuda_ipc", timeout_s=60) as publisher:
            calls, stills, walls = [], [], []
            for _ in range(rounds + 2):
                policy.step()
                torch.cuda.synchronize()
                start = time.perf_counter()
                publishing = publisher.publish(wait=False)
                calls.append((time.perf_counter() - start) * 1e3)
                policy.values[0].data.neg_()
                torch.cuda.current_stream().synchronize()
                stills.append((time.perf_counter() - start) * 1e3)
                report = publishing.wait()
                walls.append((time.perf_counter() - start) * 1e3)
                assert report.digests_match
            middle = [statistics.median(times[2:]) for times in (calls, stills, walls)]
            note = f"call {middle[0]:.1f} ms; round {middle[2]:.1f} ms; the copy alone {copy_ms:.1f} ms"
            table.add(f"{name} {mode} still", middle[1], nbytes, note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", default=["0.6B", "8B"])
    parser.add_argument("--modes", nargs="+", default=["staged"])
    options = parser.parse_args()
    table = Table("beside")
    for name in options.shapes:
        for mode in options.modes:
            try:
                measure(table, name, mode, options.rounds)
            except Exception as error:  # noqa: BLE001 - the other rows are still worth having
                table.fail(f"{name} {mode}", error)
            torch.cuda.empty_cache()
    table.save()
    table.exit()


if __name__ == "__main__":
    main()
