"""Can this architecture be run exactly? Asked of the config, then of the class, then of the model itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from weightcast.engines.embedded.attention import (
    ATTENTION_NAME,
    HINT,
    DecodeGroup,
    PieceGroup,
    PromptGroup,
    StepContext,
)
from weightcast.engines.embedded.kv import KvCache, Shelf
from weightcast.errors import Unsupported

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_PROBE_TOKENS = 7
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3}
_TOLERANCE_16_BIT = 0.1
"""Sums of many layers in another order differ by a few percent in bfloat16; a wrong mask or scale changes logits altogether."""
_PROBE_WINDOW = 2
"""Shorter than any piece of the probe, so that each kind of group meets its window."""


def check_config(config: Any, max_model_len: int | None) -> None:
    """Raise Unsupported, with the model type and the reason, for a model whose config alone shows that the model cannot be run exactly."""
    text = config.get_text_config()
    name = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise Unsupported(f"{name}: encoder-decoder models are not supported", hint=HINT)
    others = sorted(set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES)
    if others:
        raise Unsupported(f"{name}: layers of type {', '.join(others)} are not supported", hint=HINT)
    rope = _rope_types(text)
    if "dynamic" in rope:
        raise Unsupported(f"{name}: dynamic rotary scaling depends on the longest sequence in a batch", hint=HINT)
    original = getattr(text, "original_max_position_embeddings", None)
    length = max_model_len or getattr(text, "max_position_embeddings", None)
    if "longrope" in rope and (original is None or length is None or length > original):
        raise Unsupported(
            f"{name}: longrope changes its scaling with the length of a sequence",
            hint=f"Give max_model_len={original}" if original else HINT,
        )


def check_model(model: Any) -> None:
    """Raise Unsupported for a class whose attention does not go through transformers' AttentionInterface."""
    if not getattr(type(model), "_supports_attention_backend", False):
        raise Unsupported(f"{type(model).__name__} does not call attention through AttentionInterface", hint=HINT)
    if not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
        raise Unsupported(f"{type(model).__name__} is no language model", hint=HINT)


@torch.no_grad()
def probe(model: Any, eager_name: str = "eager", *, longest: int | None = None) -> int:
    """Run a few tokens through the engine's attention and through the model's own, and compare.

    Windows that a sequence of ``longest`` tokens outgrows are probed, too, as short ones. Returns the bytes of keys and values
    per token. Raises Unsupported when a layer does something that the packed attention does not: state besides keys and
    values, attention sinks, masks of its own, no attention at all.
    """
    vocab = model.config.get_text_config().vocab_size
    ids = (torch.arange(_PROBE_TOKENS, device=model.device) * 7919 + 1) % vocab
    nbytes = _probe_once(model, ids, eager_name)
    text = model.config.get_text_config()
    window = getattr(text, "sliding_window", None)
    if isinstance(window, int) and (longest is None or window < longest):
        with _windows_of(model, text, _PROBE_WINDOW):
            _probe_once(model, ids, eager_name)
    return nbytes


def _probe_once(model: Any, ids: torch.Tensor, eager_name: str) -> int:
    cache = KvCache(_PROBE_TOKENS, _PROBE_TOKENS, max_rows=1)
    shelf = cache.shelves[-1]
    shelf.resize(1)
    ours, layers = _packed_logits(model, ids, shelf)
    expected = set(range(model.config.get_text_config().num_hidden_layers))
    if layers != expected:
        raise Unsupported(
            f"{type(model).__name__}: layers {sorted(expected - layers)} do not keep keys and values of their own",
            hint=HINT,
        )
    model.set_attn_implementation(eager_name)
    try:
        reference = model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0]
    finally:
        model.set_attn_implementation(ATTENTION_NAME)
    _compare(type(model).__name__, ours, reference, num_outliers=_PROBE_TOKENS // 3 if _routes_tokens(model) else 0)
    return sum(
        tensor.shape[1] * tensor.shape[-1] * tensor.element_size() for pair in shelf.layers.values() for tensor in pair
    )


def _packed_logits(model: Any, ids: torch.Tensor, shelf: Shelf) -> tuple[torch.Tensor, set[int]]:
    """Logits of every position, computed as a prompt, then a piece, then single tokens."""
    shelf_bounds = [(0, 3), (3, 5), (5, 6), (6, 7)]
    rows = torch.zeros(1, dtype=torch.int64, device=ids.device)
    logits, layers = [], set()
    for start, stop in shelf_bounds:
        positions = torch.arange(start, stop, device=ids.device)
        count = stop - start
        group: PromptGroup | PieceGroup | DecodeGroup
        if start == 0:
            group = PromptGroup(shelf=shelf, start=0, stop=count, rows=rows, length=count)
        elif count > 1:
            group = PieceGroup(shelf=shelf, start=0, stop=count, row=0, past=start)
        else:
            group = DecodeGroup(
                shelf=shelf, start=0, stop=1, rows=rows, view=None, positions=positions, longest=stop, even=True
            )
        context = StepContext(groups=[group])
        output = model(input_ids=ids[None, start:stop], position_ids=positions[None], use_cache=False, step=context)
        logits.append(output.logits[0])
        layers |= context.layers_seen
    return torch.cat(logits), layers


@contextmanager
def _windows_of(model: Any, config: Any, window: int) -> Iterator[None]:
    """All sliding windows are as short as that, in the modules and in the config that the model's own masks are made from."""
    owners = [
        config,
        *(module for module in model.modules() if isinstance(getattr(module, "sliding_window", None), int)),
    ]
    before = [owner.sliding_window for owner in owners]
    try:
        for owner in owners:
            owner.sliding_window = window
        yield
    finally:
        for owner, value in zip(owners, before, strict=True):
            owner.sliding_window = value


def _routes_tokens(model: Any) -> bool:
    """Whether the model sends tokens to experts: configs count them under several names."""
    fields = model.config.get_text_config().to_dict()
    return any("expert" in name and isinstance(value, int) and value > 1 for name, value in fields.items())


def _compare(name: str, ours: torch.Tensor, reference: torch.Tensor, *, num_outliers: int) -> None:
    """All positions must agree but ``num_outliers``: rounding may send a token to another expert."""
    tolerance = _TOLERANCE.get(ours.dtype, _TOLERANCE_16_BIT)
    ours, reference = (torch.nan_to_num(x.double()) for x in (ours, reference))
    scale = reference.norm(dim=-1).clamp_min(1e-30)
    error = (ours - reference).norm(dim=-1) / scale
    if int((error > tolerance).sum()) > num_outliers:
        raise Unsupported(
            f"{name}: logits differ from the model's own by a factor of {float(error.max()):.2g}", hint=HINT
        )


def _rope_types(config: Any) -> set[str]:
    """Kinds of rotary scaling, whether for all layers or per layer type."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    tables = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return {str(table["rope_type"]) for table in tables if "rope_type" in table}
