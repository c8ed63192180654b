"""Reads a Llama model from a GGUF file: configuration and checkpoint tensors under Hugging Face's names.

GGUF stores query and key rows in another order than Hugging Face (its rotary embedding pairs neighbours, not halves), and
blocks of quantised values; both are undone here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from weightcast.errors import InvalidInput, Unsupported

_GLOBAL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


class GgufLlama:
    """An opened GGUF file of a Llama model; raises InvalidInput for another architecture."""

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError:
            raise Unsupported("reading GGUF needs the package gguf", hint="pip install gguf") from None
        self._gguf = gguf
        self._reader = gguf.GGUFReader(str(path))
        architecture = self._field("general.architecture")
        if architecture != "llama":
            raise InvalidInput(f"{path.name} is of architecture {architecture!r}, not llama", field="path")
        self.num_heads = int(self._field("llama.attention.head_count"))
        self.num_kv_heads = int(self._field("llama.attention.head_count_kv"))

    def config(self) -> dict[str, Any]:
        """What transformers' LlamaConfig takes."""
        names = {tensor.name for tensor in self._reader.tensors}
        return {
            "vocab_size": int(self._field("llama.vocab_size")),
            "hidden_size": int(self._field("llama.embedding_length")),
            "intermediate_size": int(self._field("llama.feed_forward_length")),
            "num_hidden_layers": int(self._field("llama.block_count")),
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "max_position_embeddings": int(self._field("llama.context_length")),
            "rms_norm_eps": round(float(self._field("llama.attention.layer_norm_rms_epsilon")), 9),
            "rope_theta": float(self._field("llama.rope.freq_base")),
            "tie_word_embeddings": "output.weight" not in names,
            "bos_token_id": int(self._field("tokenizer.ggml.bos_token_id")),
            "eos_token_id": int(self._field("tokenizer.ggml.eos_token_id")),
            "pad_token_id": int(self._field("tokenizer.ggml.padding_token_id")),
        }

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Checkpoint tensors as float32, one at a time; raises Unsupported for a tensor that nobody mapped."""
        for tensor in self._reader.tensors:
            values = torch.from_numpy(self._gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            name = _checkpoint_name(tensor.name)
            if name.endswith("q_proj.weight"):
                values = _halves_from_pairs(values, self.num_heads)
            elif name.endswith("k_proj.weight"):
                values = _halves_from_pairs(values, self.num_kv_heads)
            yield name, values.contiguous()

    def _field(self, name: str) -> Any:
        field = self._reader.get_field(name)
        if field is None:
            raise InvalidInput(f"the GGUF file has no field {name}", field=name)
        return field.contents()


def _checkpoint_name(name: str) -> str:
    if name in _GLOBAL:
        return _GLOBAL[name]
    block, _, rest = name.removeprefix("blk.").partition(".")
    if not block.isdigit() or rest not in _IN_LAYER:
        raise Unsupported(f"GGUF tensor {name!r} has no place in a Llama checkpoint")
    return f"model.layers.{block}.{_IN_LAYER[rest]}"


def _halves_from_pairs(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    rows, columns = weight.shape
    pairs = weight.view(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)
