"""Attention over a packed step: the function that transformers' modelling code calls in every layer.

A step's tokens lie one after another in one row, without padding: first one token each of the decoding sequences,
then whole prompts, then pieces of prompts whose beginning is in the KV cache already. ``StepContext`` says which token
belongs where; it travels through the modelling code as the keyword argument ``step``. Everything exact or refused: an
argument this function does not know raises Unsupported instead of being ignored.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from weightcast.engines.embedded.kv import Shelf
from weightcast.errors import Unsupported

HINT = "Serve it with vLLM, or use another architecture"

ATTENTION_NAME = "weightcast_packed"

_IGNORABLE = frozenset(
    {"position_ids", "position_embeddings", "cache_position", "use_cache", "output_attentions", "output_router_logits"}
    | {"output_hidden_states", "return_dict", "past_key_values", "logits_to_keep", "layer_idx"}
)
"""Arguments that carry nothing about attention here: rotary embeddings were applied before, the cache is ours."""


@dataclass(slots=True, kw_only=True)
class DecodeGroup:
    """Sequences on one shelf that get one token each: the packed tokens [start, stop)."""

    shelf: Shelf
    start: int
    stop: int
    rows: torch.Tensor
    view: slice | None
    """The same rows as a slice, when they are neighbours."""
    positions: torch.Tensor
    longest: int
    even: bool
    """All have the same length, so that no mask is needed."""


@dataclass(slots=True, kw_only=True)
class PromptGroup:
    """``rows`` prompts of equal length on one shelf, from their first token on: the packed tokens [start, stop)."""

    shelf: Shelf
    start: int
    stop: int
    rows: torch.Tensor
    length: int


@dataclass(slots=True, kw_only=True)
class PieceGroup:
    """A piece of one prompt, of which ``past`` tokens are in the KV cache: packed tokens [start, stop)."""

    shelf: Shelf
    start: int
    stop: int
    row: int
    past: int


AttentionGroup = DecodeGroup | PromptGroup | PieceGroup


@dataclass(slots=True, kw_only=True)
class StepContext:
    """What one forward pass computes, in the order of its packed tokens."""

    groups: list[AttentionGroup]
    layers_seen: set[int] = field(default_factory=set)
    masks: dict[tuple[int, int | None], torch.Tensor | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rules:
    """What a layer asks of attention beyond being causal."""

    scaling: float | None
    window: int | None
    softcap: float | None


def register_attention() -> None:
    """Register the function with transformers under ATTENTION_NAME. A second call does nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, packed_attention)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    step: StepContext | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Store this layer's keys and values, then attend. Arguments and result are those of transformers' own attention functions."""
    context = _checked(module, step, attention_mask, dropout, is_causal, others)
    layer = module.layer_idx
    assert isinstance(layer, int)
    context.layers_seen.add(layer)
    rules = _Rules(scaling=scaling, window=sliding_window, softcap=softcap)
    out = value.new_empty(query.shape[2], query.shape[1], value.shape[-1])
    for number, group in enumerate(context.groups):
        part = slice(group.start, group.stop)
        q, k, v = query[0, :, part], key[0, :, part], value[0, :, part]
        keys, values = group.shelf.layer(layer, k, v)
        mask = _mask(context, number, rules.window, q)
        if isinstance(group, DecodeGroup):
            out[part] = _decode(group, q, k, v, keys, values, mask, rules)
        elif isinstance(group, PromptGroup):
            out[part] = _prompts(group, q, k, v, keys, values, mask, rules)
        else:
            out[part] = _piece(group, q, k, v, keys, values, mask, rules)
    return out.unsqueeze(0), None


def _checked(
    module: torch.nn.Module,
    step: StepContext | None,
    attention_mask: torch.Tensor | None,
    dropout: float,
    is_causal: bool | None,
    others: dict[str, Any],
) -> StepContext:
    unknown = sorted(name for name, value in others.items() if value is not None and name not in _IGNORABLE)
    if unknown:
        raise Unsupported(
            f"{type(module).__name__} asks attention for {', '.join(unknown)}, which is not implemented", hint=HINT
        )
    if step is None:
        raise Unsupported(f"{type(module).__name__} does not pass keyword arguments on to its attention", hint=HINT)
    if attention_mask is not None:
        raise Unsupported(f"{type(module).__name__} makes an attention mask of its own", hint=HINT)
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise Unsupported(f"{type(module).__name__} attends in both directions", hint=HINT)
    if dropout:
        raise Unsupported(f"{type(module).__name__} asks for dropout", hint=HINT)
    if not isinstance(getattr(module, "layer_idx", None), int):
        raise Unsupported(f"{type(module).__name__} has no layer_idx", hint=HINT)
    return step


def _decode(
    group: DecodeGroup,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    rules: _Rules,
) -> torch.Tensor:
    """(heads, n, size) to (n, heads, size). Query heads that share keys become rows of one small matrix product."""
    keys[group.rows, :, group.positions] = k.transpose(0, 1)
    values[group.rows, :, group.positions] = v.transpose(0, 1)
    rows = group.rows if group.view is None else group.view
    past_keys, past_values = keys[rows][:, :, : group.longest], values[rows][:, :, : group.longest]
    num_rows, kv_heads = past_keys.shape[:2]
    folded = q.transpose(0, 1).reshape(num_rows, kv_heads, -1, q.shape[-1])
    out = _attend(folded, past_keys, past_values, mask, rules, causal=False)
    return out.reshape(num_rows, -1, v.shape[-1])


def _prompts(
    group: PromptGroup,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    rules: _Rules,
) -> torch.Tensor:
    """(heads, m * length, size) to (m * length, heads, size), all prompts of one length in one call."""
    count = group.rows.shape[0]
    q, k, v = (_stacked(x, count) for x in (q, k, v))
    keys[group.rows, :, : group.length] = k
    values[group.rows, :, : group.length] = v
    repeats = q.shape[1] // k.shape[1]
    out = _attend(q, _repeat(k, repeats), _repeat(v, repeats), mask, rules, causal=True)
    return out.transpose(1, 2).flatten(0, 1)


def _piece(
    group: PieceGroup,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    rules: _Rules,
) -> torch.Tensor:
    """(heads, n, size) to (n, heads, size), over what the cache holds and this piece."""
    end = group.past + group.stop - group.start
    keys[group.row, :, group.past : end] = k
    values[group.row, :, group.past : end] = v
    repeats = q.shape[0] // k.shape[0]
    all_keys = _repeat(keys[group.row : group.row + 1, :, :end], repeats)
    all_values = _repeat(values[group.row : group.row + 1, :, :end], repeats)
    out = _attend(q.unsqueeze(0), all_keys, all_values, mask, rules, causal=False)
    return out[0].transpose(0, 1)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    rules: _Rules,
    *,
    causal: bool,
) -> torch.Tensor:
    """``mask`` is additive; without one and with ``causal``, query i sees keys 0..i."""
    if rules.softcap is None:
        return scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=rules.scaling
        )
    scale = q.shape[-1] ** -0.5 if rules.scaling is None else rules.scaling
    scores = torch.matmul(q, k.transpose(-1, -2)) * scale
    scores = torch.tanh(scores / rules.softcap) * rules.softcap
    if mask is None and causal:
        mask = _causal_mask(q.shape[-2], 0, None, q)
    if mask is not None:
        scores = scores + mask
    precise = torch.float64 if scores.dtype == torch.float64 else torch.float32
    return torch.matmul(torch.softmax(scores, dim=-1, dtype=precise).to(q.dtype), v)


def _stacked(x: torch.Tensor, count: int) -> torch.Tensor:
    """(heads, count * n, size) to (count, heads, n, size)."""
    return x.reshape(x.shape[0], count, -1, x.shape[-1]).transpose(0, 1)


def _repeat(x: torch.Tensor, times: int) -> torch.Tensor:
    """(b, heads, n, size) with every head repeated in place."""
    if times == 1:
        return x
    return x.unsqueeze(2).expand(-1, -1, times, -1, -1).flatten(1, 2)


def _mask(context: StepContext, number: int, window: int | None, like: torch.Tensor) -> torch.Tensor | None:
    """The additive mask of one group, made once per step and window size."""
    place = (number, window)
    if place not in context.masks:
        context.masks[place] = _build_mask(context.groups[number], window, like)
    return context.masks[place]


def _build_mask(group: AttentionGroup, window: int | None, like: torch.Tensor) -> torch.Tensor | None:
    if isinstance(group, DecodeGroup):
        if group.even and (window is None or group.longest <= window):
            return None
        at = torch.arange(group.longest, device=like.device)
        last = group.positions.unsqueeze(1)
        seen = at <= last
        if window is not None:
            seen &= at > last - window
        return _additive(seen, like)[:, None, None]
    if isinstance(group, PromptGroup):
        if window is None or group.length <= window:
            return None
        return _causal_mask(group.length, 0, window, like)
    return _causal_mask(group.stop - group.start, group.past, window, like)


def _causal_mask(length: int, past: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
    at = torch.arange(past + length, device=like.device)
    own = at[past:].unsqueeze(1)
    seen = at <= own
    if window is not None:
        seen &= at > own - window
    return _additive(seen, like)


def _additive(seen: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, float("-inf"))
