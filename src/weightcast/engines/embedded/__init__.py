"""The embedded engine: generates anywhere torch runs and takes new weights between two forward passes."""

from weightcast.engines.base import (
    CompletionOutput,
    EngineStatus,
    Logprob,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    VersionSpan,
)
from weightcast.engines.embedded.async_llm import AsyncLLM
from weightcast.engines.embedded.config import EngineConfig
from weightcast.engines.embedded.llm import LLM
from weightcast.engines.sampling import StructuredOutputs
from weightcast.weight_transfer.config import WeightTransferConfig

__all__ = [
    "LLM",
    "AsyncLLM",
    "SamplingParams",
    "StructuredOutputs",
    "RequestOutput",
    "RequestOutputKind",
    "CompletionOutput",
    "Logprob",
    "VersionSpan",
    "EngineStatus",
    "EngineConfig",
    "WeightTransferConfig",
]
