"""Building the model and tokenizer that an engine runs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from weightcast.engines.embedded.attention import ATTENTION_NAME, register_attention
from weightcast.engines.embedded.config import EngineConfig
from weightcast.engines.embedded.given import device_of
from weightcast.engines.embedded.support import check_config, check_model
from weightcast.errors import InvalidInput, Unsupported
from weightcast.manifest.dtypes import dtype_of
from weightcast.quoted import quoted
from weightcast.room import host_room_nbytes

_CPU_KV_SHARE = 0.25
_CUDA_KV_SHARE = 0.5


def load_model(config: EngineConfig) -> Any:
    """The model in eval mode on its device, attending through the packed attention function.

    It shares neither parameters nor config with anything the caller holds. Raises Unsupported for an architecture that
    cannot be run exactly, InvalidInput for a model that is not there.
    """
    from transformers import AutoConfig, PreTrainedModel

    register_attention()
    device = device_of(config.device)
    if isinstance(config.model, PreTrainedModel):
        check_config(config.model.config, config.max_model_len)
        model = copy.deepcopy(config.model)
        if config.dtype != "auto":
            model = model.to(dtype_of(config.dtype))
    else:
        _check_name(config.model)
        try:
            model_config = AutoConfig.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
        except (OSError, ValueError) as error:
            raise InvalidInput(
                f"no model can be read from {str(config.model)!r}: {quoted(str(error))}",
                field="model",
                hint=_hint(error),
            ) from error
        check_config(model_config, config.max_model_len)
        model = _dummy(config, model_config) if config.load_format == "dummy" else _load(config, model_config)
    check_model(model)
    model.set_attn_implementation(ATTENTION_NAME)
    if model.dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped matrix product knows no float64
    return model.to(device).eval().requires_grad_(False)


def load_tokenizer(config: EngineConfig) -> Any:
    """The tokenizer, or None when there is none: the engine then takes and gives token ids only."""
    from transformers import AutoTokenizer

    source = config.tokenizer
    if source is not None and not isinstance(source, str | Path):
        return source
    if source is None:
        if not isinstance(config.model, str | Path) or not _has_tokenizer(config.model):
            return None
        source = config.model
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"no tokenizer can be read from {str(source)!r}: {quoted(str(error))}",
            field="tokenizer",
            hint=_hint(error)
            or "Give the folder of a tokenizer; without tokenizer= the model's own is taken, if it has one",
        ) from error


def model_length(model: Any, asked: int | None) -> int:
    """The longest sequence: what the user asked for, within what the model's positions allow."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if asked is None:
        return int(limit or 2048)
    if limit is not None and asked > limit:
        raise InvalidInput(f"max_model_len {asked} is more than the model's {limit} positions", field="max_model_len")
    return asked


def kv_capacity(config: EngineConfig, max_model_len: int, bytes_per_token: int, device: torch.device) -> int:
    """For how many tokens keys and values may be allocated."""
    asked = config.kv_cache_tokens
    if asked is not None:
        if asked < max_model_len:
            raise InvalidInput(
                f"kv_cache_tokens {asked} is less than max_model_len {max_model_len}",
                field="kv_cache_tokens",
                hint="One sequence of full length must fit; give a smaller max_model_len",
            )
        return asked
    if device.type == "cuda":
        budget = torch.cuda.mem_get_info(device)[0] * _CUDA_KV_SHARE
    else:
        room = host_room_nbytes()
        if room is None:
            raise InvalidInput(
                "cannot tell how much memory is free", field="kv_cache_tokens", hint="Give kv_cache_tokens"
            )
        budget = room * _CPU_KV_SHARE
    affordable = int(budget / max(1, bytes_per_token))
    if affordable < max_model_len:
        raise InvalidInput(
            f"free memory holds keys and values of {affordable} tokens, max_model_len is {max_model_len}",
            field="max_model_len",
        )
    # A row may be up to twice as long as its sequence.
    return min(affordable, 2 * config.max_num_seqs * max_model_len)


def eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an output: those that ``model.generate`` stops at, and the tokenizer's."""
    found: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        if value is not None:
            found |= set(value) if isinstance(value, list | tuple) else {value}
    return frozenset(int(token) for token in found)


def _check_name(model: Any) -> None:
    if not isinstance(model, str | Path) or not str(model):
        raise InvalidInput(f"model is a folder, a hub name or a transformers model, not {model!r}", field="model")


def _has_tokenizer(model: str | Path) -> bool:
    folder = Path(model)
    return not folder.is_dir() or any(folder.glob("tokenizer*")) or (folder / "vocab.json").exists()


def _dtype(config: EngineConfig, model_config: Any) -> torch.dtype:
    if config.dtype != "auto":
        return dtype_of(config.dtype)
    named = getattr(model_config, "dtype", None)
    return named if isinstance(named, torch.dtype) else torch.float32


def _load(config: EngineConfig, model_config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            config.model,
            config=model_config,
            dtype="auto" if config.dtype == "auto" else dtype_of(config.dtype),
            trust_remote_code=config.trust_remote_code,
            # Other files are unpickled, which runs code of whoever made them.
            use_safetensors=None if config.trust_remote_code else True,
        )
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"model {str(config.model)!r} cannot be loaded: {quoted(str(error))}", field="model", hint=_hint(error)
        ) from error


def _hint(error: Exception) -> str | None:
    """What to do where a model asks for more trust than it has."""
    text = str(error)
    if "trust_remote_code" in text:
        return "Read the code that comes with it; if you trust it, give trust_remote_code (--trust-remote-code)"
    if "couldn't connect" in text or "offline" in text.lower():
        return "Check the name and the network, or give the folder of a model that is here already"
    if "safetensors" in text:
        return "Convert the weights to safetensors; if you trust who pickled them, give trust_remote_code (--trust-remote-code)"
    return None


def _dummy(config: EngineConfig, model_config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return AutoModelForCausalLM.from_config(model_config, dtype=_dtype(config, model_config))
    except ValueError as error:
        raise Unsupported(f"{type(model_config).__name__} is no language model: {error}") from error
