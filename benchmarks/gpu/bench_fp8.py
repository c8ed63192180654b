"""Stock vLLM that quantises what it loads to FP8, on one GPU: publish() in place and staged beside vLLM's own ipc backend, and the stall of
requests in flight.

The first part is bench_vllm's comparison of one engine, with rows for staged rounds. The second part is bench_stall's, with ``vllm serve
--quantization fp8``. Trainer and wire are in bf16: rates count the bytes of the checkpoint.

    python benchmarks/gpu/bench_fp8.py [publish] [stall] [--shape 8B] [--quantization fp8]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_stall import NUM_STREAMS, Clients
from bench_stall import measure as measure_stall
from bench_vllm import GRAPHS, Trainer, compare, config_folder, plain
from common import Medians, Table, end_cleanly_when_terminated, reports_of
from gpu_vllm import vllm_server
from shapes import SHAPES

from weightcast import Publisher
from weightcast.sources import ModuleSource
from weightcast.testing.ranks import Peer
from weightcast.testing.tokenizer import build_tokenizer

STALL_WAYS = ["staged, two shadows, keys and values kept", "staged", "in place"]


def staged(table: Table, llm: Any, trainer: Trainer, name: str, rounds: int) -> None:
    """A staged round: the engine stands still for the commit only."""
    source = ModuleSource(trainer, names=trainer.names)
    with Publisher(source, [llm], mode="staged", timeout_s=100) as publisher:
        reports = reports_of(publisher, trainer.step, rounds)
        total, phases, _ = Medians.of(reports)
        worker = reports[-1].engines[0].workers[0]
        note = f"{phases}; {worker.shadow_nbytes / 1e9:.1f} GB in {worker.shadow or 'no shadow'}"
        table.add(f"{name}: weightcast publish(), staged", total, trainer.nbytes, note)


def publish(table: Table, name: str, quantization: str, rounds: int) -> None:
    from vllm import LLM

    shape = SHAPES[name]
    trainer = Trainer(shape)
    plain_ms = plain(trainer)
    torch.cuda.empty_cache()
    label = f"{name} {quantization}"
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        llm = LLM(
            str(config_folder(shape, Path(folder) / "m")), load_format="dummy", skip_tokenizer_init=True, max_model_len=512,
            max_num_seqs=4, kv_cache_memory_bytes=512 << 20, gpu_memory_utilization=0.3, compilation_config=GRAPHS,
            weight_transfer_config={"backend": "weightcast"}, worker_extension_cls="vllm_worker.BenchWorker",
            disable_log_stats=True, quantization=quantization,
        )  # fmt: skip
        print(f"{label}: vLLM up in {time.perf_counter() - start:.1f} s", flush=True)
        try:
            staged(table, llm, trainer, label, rounds)
            compare(table, llm, trainer, label, plain_ms, rounds)
        finally:
            llm.llm_engine.engine_core.shutdown()


def stall(table: Table, name: str, quantization: str, rounds: int) -> None:
    trainer = Trainer(SHAPES[name])
    with tempfile.TemporaryDirectory() as folder, Peer(Clients) as clients:
        path = config_folder(SHAPES[name], Path(folder) / "m")
        build_tokenizer().save_pretrained(path)
        flags = ["--load-format", "dummy", "--kv-cache-memory-bytes", str(2 << 30), "--max-model-len", "4096"]
        graphs = str(GRAPHS).replace("'", '"')
        flags += ["--compilation-config", graphs, "--quantization", quantization]
        start = time.monotonic()
        with vllm_server(path, "weightcast", *flags) as server:
            print(
                f"{name} {quantization}: server up in {time.monotonic() - start:.1f} s, {NUM_STREAMS} streams",
                flush=True,
            )
            clients.call("start", server.url)
            time.sleep(1.5)
            for way in STALL_WAYS:
                try:
                    measure_stall(table, trainer, way, server, clients, rounds)
                except Exception as error:  # noqa: BLE001 - the other rows are still worth having
                    table.fail(way, error)
            clients.call("end", timeout_s=60)


def main() -> None:
    end_cleanly_when_terminated()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["publish", "stall"])
    parser.add_argument("--shape", default="8B")
    parser.add_argument("--quantization", default="fp8")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    table = Table("fp8")
    for part in options.parts:
        try:
            {"publish": publish, "stall": stall}[part](table, options.shape, options.quantization, options.rounds)
        except Exception as error:  # noqa: BLE001 - the other part is still worth having
            table.fail(part, error)
        torch.cuda.empty_cache()
    table.save()
    table.exit()


if __name__ == "__main__":
    main()
