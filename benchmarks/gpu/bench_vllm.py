"""Stock vLLM on one GPU: its native ipc backend, per tensor and packed, beside weightcast's publish(), same engine, same bytes.

One run per shape: a trainer in this process, vLLM's engine in its own with dummy weights and CUDA graphs. The native backend is
driven as vLLM's own trainer code does over HTTP (handles pickled), without HTTP. After both, the live parameters' checksums are
compared: weightcast and vLLM's loader have to leave the same bytes.

    python benchmarks/gpu/bench_vllm.py 0.6B 8B MoE [--rounds 7]
"""

from __future__ import annotations

import os

os.environ |= {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}

import argparse
import base64
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import Medians, Table, end_cleanly_when_terminated, gpu_ms, reports_of
from shapes import SHAPES, Shape
from torch import nn

from weightcast import Publisher
from weightcast.sources import ModuleSource

GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4]}
PROMPTS = [[5, 17, 33, 2, 90], [44, 45, 46], list(range(60, 100)), [7]]


def config_folder(shape: Shape, folder: Path) -> Path:
    from transformers import Qwen3Config, Qwen3MoeConfig

    common = {
        "num_hidden_layers": shape.layers, "hidden_size": shape.hidden, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim, "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied, "max_position_embeddings": 4096, "dtype": "bfloat16",
    }  # fmt: skip
    if shape.num_experts:
        config: Any = Qwen3MoeConfig(
            **common, intermediate_size=6144, moe_intermediate_size=shape.inter, num_experts=shape.num_experts,
            num_experts_per_tok=8, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
        )  # fmt: skip
        config.architectures = ["Qwen3MoeForCausalLM"]
    else:
        config = Qwen3Config(**common, intermediate_size=shape.inter)
        config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(folder)
    return folder


def checkpoint_shapes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Qwen3 checkpoint."""
    h, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", (shape.vocab, h)
    for layer in range(shape.layers):
        at = f"model.layers.{layer}."
        for name, size in (("q_proj", (q, h)), ("k_proj", (kv, h)), ("v_proj", (kv, h)), ("o_proj", (h, q))):
            yield f"{at}self_attn.{name}.weight", size
        for name in ("q_norm", "k_norm"):
            yield f"{at}self_attn.{name}.weight", (shape.head_dim,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}{name}.weight", (h,)
        experts = [f"experts.{number}." for number in range(shape.num_experts)] or [""]
        if shape.num_experts:
            yield f"{at}mlp.gate.weight", (shape.num_experts, h)
        for expert in experts:
            for name, size in (
                ("gate_proj", (shape.inter, h)),
                ("up_proj", (shape.inter, h)),
                ("down_proj", (h, shape.inter)),
            ):
                yield f"{at}mlp.{expert}{name}.weight", size
    yield "model.norm.weight", (h,)
    if not shape.tied:
        yield "lm_head.weight", (shape.vocab, h)


class Trainer(nn.Module):
    """Checkpoint tensors on the GPU, each in a storage of its own."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.values = nn.ParameterList()
        self.names: dict[str, torch.Tensor] = {}
        for name, size in checkpoint_shapes(shape):
            value = torch.randn(size, device="cuda", dtype=torch.bfloat16)
            value = value * 0.5 + 1 if len(size) == 1 else value.mul_(size[-1] ** -0.5)
            self.values.append(nn.Parameter(value, requires_grad=False))
            self.names[name] = self.values[-1]

    def step(self) -> None:
        torch._foreach_neg_(list(self.values))

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.values)


def timed(call: Callable[[], object], rounds: int, before: Callable[[], object]) -> list[float]:
    """Milliseconds of each call after one that is not counted."""
    times = []
    for _ in range(rounds + 1):
        before()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times[1:]


def native(llm: Any, trainer: Trainer, *, packed: bool) -> None:
    """One update by vLLM's own trainer code for its ipc backend."""
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerSendWeightsArgs, IPCWeightTransferEngine

    def send(info: Any) -> None:
        fields = {"names": info.names, "dtype_names": info.dtype_names, "shapes": info.shapes, "packed": info.packed}
        if info.tensor_sizes is not None:
            fields["tensor_sizes"] = info.tensor_sizes
        fields["ipc_handles_pickled"] = base64.b64encode(pickle.dumps(info.ipc_handles)).decode()
        llm.update_weights({"update_info": fields})

    llm.start_weight_update()
    largest = max(value.nbytes for value in trainer.names.values())  # a tensor has to fit into a buffer
    arguments = IPCTrainerSendWeightsArgs(send_mode=send, packed=packed, packed_buffer_size_bytes=max(largest, 2**30))
    IPCWeightTransferEngine.trainer_send_weights(iter(trainer.names.items()), arguments)
    llm.finish_weight_update()


def tokens(llm: Any) -> list[list[int]]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, detokenize=False)
    found = []
    for ids in PROMPTS:
        # One by one, and nothing cached: which prompts share a step depends on when they come, and other shapes round otherwise.
        # A router with random weights is near a tie often enough to choose other experts for that.
        llm.reset_prefix_cache()
        (output,) = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
        found.append(list(output.outputs[0].token_ids))
    return found


def ours(table: Table, llm: Any, trainer: Trainer, name: str, plain_ms: float, rounds: int) -> None:
    source = ModuleSource(trainer, names=trainer.names)
    with Publisher(source, [llm], mode="in_place", timeout_s=100) as publisher:
        start = time.perf_counter()
        publisher.connect()
        connect_s = time.perf_counter() - start
        for prepared in (False, True):
            reports = reports_of(publisher, trainer.step, rounds, prepared=prepared)
            total, phases, worker = Medians.of(reports)
            transport = reports[0].engines[0].workers[0].transport
            note = f"x{total / plain_ms:.2f} of foreach; {transport}; {phases}; connect {connect_s:.2f} s"
            label = f"{name}: weightcast publish()" + ", prepared" * prepared
            table.add(label, total, trainer.nbytes, note)
        table.add(f"{name}: weightcast copy and digest", worker, trainer.nbytes, f"x{worker / plain_ms:.2f} of foreach")
        print(name, "layout:", llm.collective_rpc("bench_layout"), flush=True)


def plain(trainer: Trainer) -> float:
    """torch._foreach_copy_ of the same tensors; of a half of them where both copies do not fit, doubled."""
    values = [value.data for value in trainer.values]
    share = 1 if trainer.nbytes < 20e9 else 2
    values = values[::share]
    copies = [torch.empty_like(value) for value in values]
    copied = sum(value.nbytes for value in values)
    return gpu_ms(lambda: torch._foreach_copy_(copies, values), 5) * trainer.nbytes / copied


def measure(table: Table, name: str, rounds: int) -> None:
    from vllm import LLM

    shape = SHAPES[name]
    trainer = Trainer(shape)
    plain_ms = plain(trainer)
    torch.cuda.empty_cache()
    table.add(f"{name}: torch._foreach_copy_ of {len(trainer.values)} tensors", plain_ms, trainer.nbytes)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        llm = LLM(
            str(config_folder(shape, Path(folder) / "m")), load_format="dummy", skip_tokenizer_init=True, max_model_len=512,
            max_num_seqs=4, kv_cache_memory_bytes=512 << 20, gpu_memory_utilization=0.3, compilation_config=GRAPHS,
            weight_transfer_config={"backend": "weightcast"}, worker_extension_cls="vllm_worker.BenchWorker",
            disable_log_stats=True,
        )  # fmt: skip
        print(f"{name}: vLLM up in {time.perf_counter() - start:.1f} s", flush=True)
        try:
            compare(table, llm, trainer, name, plain_ms, rounds)
        finally:
            llm.llm_engine.engine_core.shutdown()


def compare(table: Table, llm: Any, trainer: Trainer, name: str, plain_ms: float, rounds: int) -> None:
    ours(table, llm, trainer, name, plain_ms, rounds)
    pushed, sums = tokens(llm), llm.collective_rpc("bench_sums")[0]
    if tokens(llm) != pushed:
        table.fail(f"{name}: tokens", ValueError("the same weights do not give the same tokens twice"))
    print(name, "backend:", llm.collective_rpc("bench_use", args=("ipc",)), flush=True)
    llm.init_weight_transfer_engine({"init_info": {}})
    loaded: list[list[int]] = []
    for packed in (False, True):
        label = f"{name}: vLLM's ipc, {'packed' if packed else 'per tensor'}"
        try:
            times = timed(
                lambda packed=packed: native(llm, trainer, packed=packed), 3 if name != "MoE" else 1, lambda: None
            )  # type: ignore[misc]
            table.add(label, statistics.median(times), trainer.nbytes, f"min {min(times):.1f}")
        except Exception as error:  # noqa: BLE001 - the other rows are still worth having
            table.fail(label, error)
        if not packed:
            loaded = tokens(llm)
    llm.collective_rpc("bench_use", args=("weightcast",))
    same_sums = sums == llm.collective_rpc("bench_sums")[0]
    equal = f"tokens after publish() and after vLLM's own loader equal: {pushed == loaded}, bytes equal: {same_sums}"
    print(f"{name}: {equal}", flush=True)
    if not same_sums or pushed != loaded:
        table.fail(f"{name}: the same weights", ValueError(equal))


def main() -> None:
    end_cleanly_when_terminated()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", default=["0.6B"])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    table = Table("vllm")
    for name in options.shapes or list(SHAPES):
        try:
            measure(table, name, options.rounds)
        except Exception as error:  # noqa: BLE001 - the other shapes are still worth having
            table.fail(name, error)
        torch.cuda.empty_cache()
    table.save()
    table.exit()


if __name__ == "__main__":
    main()
