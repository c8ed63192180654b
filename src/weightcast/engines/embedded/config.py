"""EngineConfig: everything an embedded engine is started with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from weightcast.errors import InvalidInput, Unsupported
from weightcast.weight_transfer.config import WeightTransferConfig

_COMPUTED = ("float32", "bfloat16", "float16", "float64")
"""Types that a model is computed in."""
_POSITIVE = (
    *("max_model_len", "max_num_seqs", "max_num_batched_tokens", "kv_cache_tokens", "max_waiting", "num_threads"),
    *("max_adapters", "max_lora_rank"),
)
_PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Arguments of LLM and AsyncLLM; names follow vLLM where vLLM has one. Validates itself.

    ``model`` is a folder or hub name, or a transformers PreTrainedModel, of which the engine makes its own copy.
    None means that the engine chooses: ``device`` is the first GPU, or else the CPU; ``max_model_len`` is the length that the model's
    positions allow (2048 where they allow any length); ``kv_cache_tokens`` is the number of tokens that a quarter of the free memory
    (half of it on a GPU) holds, and at most twice ``max_num_seqs * max_model_len``. With ``num_threads`` None torch's setting stays.
    """

    model: Any
    tokenizer: Any = None
    """A folder or hub name, or a tokenizer; None: the one beside the model, if there is one."""
    served_model_name: str | None = None
    dtype: str = "auto"
    device: str | None = None
    load_format: Literal["auto", "dummy"] = "auto"
    """dummy: random weights from ``seed``, only the config is read."""
    max_model_len: int | None = None
    max_num_seqs: int = 64
    """How many sequences may be in one forward pass."""
    max_num_batched_tokens: int = 2048
    """How many tokens may be in one forward pass; longer prompts are computed in pieces."""
    kv_cache_tokens: int | None = None
    """For how many tokens keys and values may be kept, counted as allocated."""
    max_waiting: int = 4096
    """How many sequences may wait for a place before new requests are refused (``LLM.generate`` is exempt)."""
    seed: int = 0
    trust_remote_code: bool = False
    """Run Python that comes with the model's folder or the tokenizer's, and read weights that are pickled."""
    num_threads: int | None = None
    weight_transfer_config: WeightTransferConfig | Mapping[str, Any] | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    max_adapters: int = 8
    """How many versions of LoRA adapters may be there at a time. An adapter takes two while its trainer is connected, one otherwise, and
    one more for each older version that requests run on."""
    max_lora_rank: int = 64
    call_timeout_s: float = 600.0
    """Deadline of every call that is not generation: weight updates, pauses, commands between steps."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight_transfer_config", WeightTransferConfig.of(self.weight_transfer_config))
        if self.dtype not in ("auto", *_COMPUTED):
            raise InvalidInput(f"dtype is auto, {' or '.join(_COMPUTED)}, not {self.dtype!r}", field="dtype")
        if self.load_format not in ("auto", "dummy"):
            raise InvalidInput(f"load_format is auto or dummy, not {self.load_format!r}", field="load_format")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise InvalidInput(f"{name} is a positive integer, not {value!r}", field=name)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise InvalidInput(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is less than max_num_seqs {self.max_num_seqs}",
                field="max_num_batched_tokens",
                hint="Every running sequence needs one token per step",
            )
        for name in _PARALLEL:
            self._check_one(name, getattr(self, name))

    @property
    def transfer(self) -> WeightTransferConfig:
        """The weight transfer config, never None."""
        return WeightTransferConfig.of(self.weight_transfer_config)

    @staticmethod
    def _check_one(name: str, value: int) -> None:
        if value != 1:
            raise Unsupported(
                f"{name}={value!r}: the embedded engine runs one worker",
                hint="Start several engines and give the publisher all of them, or use vLLM",
            )
