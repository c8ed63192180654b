"""How long publish() of a LoRA adapter takes beside running streams of the embedded engine, and the longest gap between two of their tokens.

8B shape, rank 16 on all linear layers. ``--tiny`` tries the script on a CPU.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from weightcast import Publisher
from weightcast.engines.embedded import LLM, SamplingParams

SHAPE = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32}
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
STREAMS, ROUNDS = 16, 20


@torch.no_grad()
def step(model: Any) -> None:
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.add_(torch.randn_like(value) * 0.01)


class Streams:
    """When each step of the running requests ended."""

    def __init__(self, llm: LLM, adapter: str) -> None:
        self.at: list[float] = []
        params = SamplingParams(max_tokens=1800, temperature=0.0, ignore_eos=True)
        made = [
            llm.engine.request([5, 6, 7 + n], params, self._hear if n == 0 else _ignore, stream=n == 0, adapter=adapter)
            for n in range(STREAMS)
        ]
        llm.engine.submit(made).result(60)

    def _hear(self, _: object) -> None:
        self.at.append(time.perf_counter())

    def gaps(self, since: float) -> list[float]:
        times = [at for at in self.at if at >= since]
        return [later - earlier for earlier, later in itertools.pairwise(times)]


def _ignore(_: object) -> None:
    return


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    tiny = parser.parse_args().tiny
    device, dtype = ("cpu", torch.float32) if tiny else ("cuda", torch.bfloat16)
    shape = {
        **(TINY if tiny else SHAPE),
        "num_key_value_heads": 2 if tiny else 8,
        "vocab_size": 512 if tiny else 151936,
    }
    config = AutoConfig.for_model("qwen3", max_position_embeddings=4096, **shape)
    config.dtype = dtype
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    llm = LLM(model, device=device, max_model_len=2048)
    trainer = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"), adapter_name="policy")
    with Publisher(trainer, [llm], adapter="policy", timeout_s=120) as publisher:
        publisher.connect()
        publisher.publish()
        streams = Streams(llm, "policy")
        while len(streams.at) < 60:
            time.sleep(0.01)
        usual = streams.gaps(streams.at[30])
        calls, began = [], time.perf_counter()
        for _ in range(ROUNDS):
            step(trainer)
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            publisher.publish()
            calls.append(time.perf_counter() - start)
        gaps = streams.gaps(began)
        report = publisher.last_report
    assert report is not None
    ms = 1000.0
    print(f"adapter of {sum(w.nbytes for e in report.engines for w in e.workers) / 1e6:.1f} MB, {STREAMS} streams")
    print(f"publish(): median {statistics.median(calls) * ms:.1f} ms, longest {max(calls) * ms:.1f} ms")
    print(f"step: usual {statistics.median(usual) * ms:.1f} ms (longest {max(usual) * ms:.1f})")
    print(f"longest gap between two tokens while publishing: {max(gaps, default=0.0) * ms:.1f} ms")
    llm.shutdown()


if __name__ == "__main__":
    main()
