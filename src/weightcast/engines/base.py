"""The contract between an inference engine and the server in front of it; names and shapes follow vLLM's AsyncLLM.

Any engine that offers this can be served by weightcast.server: the embedded one does, a test double may.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from weightcast.engines.sampling import RequestOutputKind as RequestOutputKind
from weightcast.engines.sampling import SamplingParams as SamplingParams

if TYPE_CHECKING:
    from weightcast.content.live_tensors import TensorDigest
    from weightcast.manifest import Manifest

PauseMode = Literal["abort", "wait", "keep"]
FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprob:
    """Natural log-probability of one token, its rank among all (1 is the likeliest) and its text."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSpan:
    """Tokens [start, end) of an output were produced by ``version``."""

    version: str
    start: int
    end: int


@dataclass(slots=True, kw_only=True)
class CompletionOutput:
    """One of a request's n outputs. Every output object holds all tokens and text that were made until now."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended it, if one did."""
    weight_versions: list[VersionSpan] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """The state of one request: its prompt and n outputs. ``finished`` is true when all outputs are finished."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    error: str | None = None
    """Why the engine ended the request, when finish_reason is "error"."""
    adapter: str | None = None
    """Name and version of the LoRA adapter that the request ran on, such as ``policy@3-9f2c…``; None without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterStatus:
    """What an engine serves under the name of an adapter."""

    weight_version: str
    digest: str | None
    """Hex digest the live version was committed with; None before the first sync."""
    dirty: bool = False
    ready: bool = True
    versions: Mapping[str, int] = field(default_factory=dict)
    """How many requests run on each version that is there, by its name, such as ``policy@3-9f2c…``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """A snapshot for /health, /ready, /metrics, /weightcast/status and the command line. A count that the engine does not tell is None."""

    model: str
    weight_version: str
    digest: str | None
    """Hex digest the live version was committed with; None before the first sync."""
    ready: bool
    """False before the first sync when the engine waits for weights, while dirty, and after a fatal error."""
    reason: str
    """Why not ready, for a person; empty when ready."""
    dirty: bool
    paused: bool
    num_running: int | None
    num_waiting: int | None
    num_kv_tokens: int | None
    kv_capacity_tokens: int | None
    num_generated_tokens: int | None
    num_preemptions: int | None
    num_syncs: int | None
    world_size: int
    backend: str
    num_weight_bytes: int | None = None
    """Bytes of weights that were received; None where nobody counts them."""
    alive: bool = True
    """False once the engine will never serve again. One that waits for weights, or whose weights are of no version, is alive."""
    adapters: Mapping[str, AdapterStatus] = field(default_factory=dict)
    """The LoRA adapters that are served beside the model, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveDigests:
    """Digests of the values that were live at one moment, by checkpoint tensor. Tensors that the model does not use are left out."""

    weight_version: str
    tensors: Mapping[str, TensorDigest]


@runtime_checkable
class DigestsTensors(Protocol):
    """An engine that knows where checkpoint tensors lie in its live weights. Optional beside InferenceEngine."""

    async def tensor_digests(self, manifest: Manifest) -> LiveDigests:
        """Digest the live values of each tensor where they lie. PlanMismatch when the tensors are another model's."""
        ...


@runtime_checkable
class HoldsAdapters(Protocol):
    """An engine that serves LoRA adapters beside its model. Optional beside InferenceEngine."""

    @property
    def adapter_names(self) -> Sequence[str]:
        """The names of adapters of which a version is live."""
        ...

    @property
    def joined_adapters(self) -> Sequence[str]:
        """The names of adapters whose trainer has joined, now or before."""
        ...

    async def update_adapter(self, name: str, update_info: Mapping[str, Any]) -> None:
        """Make a round of an adapter live, or take it back. Nothing else of the engine is touched."""
        ...

    async def remove_adapter(self, name: str) -> None:
        """Serve an adapter no more; requests that run on it end as they would have."""
        ...


class InferenceEngine(Protocol):
    """What a server needs of an engine. All methods may be called from one event loop; ``generate`` calls run at the same time.

    InvalidInput is raised for bad arguments, and nothing changes then; StateError for a call at the wrong moment; EngineError when the
    engine is gone.
    """

    @property
    def model_name(self) -> str: ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer. None where the engine has no tokenizer: the engine then takes and returns token ids only."""
        ...

    def generate(
        self, prompt: str | Sequence[int], sampling_params: SamplingParams, request_id: str | None = None
    ) -> AsyncIterator[RequestOutput]:
        """Yield outputs that hold everything so far, the last of them finished (with FINAL_ONLY that one alone). Closing the iterator
        early aborts the request."""
        ...

    async def abort(self, request_ids: Sequence[str] | None = None) -> int:
        """Abort these requests, or all requests for None. The requests' iterators end with finish_reason "abort". Returns how many
        requests ended."""
        ...

    async def pause_generation(self, mode: PauseMode = "abort", clear_cache: bool = True) -> None:
        """Stop the engine's steps. Mode "abort" ends all requests, "wait" finishes them first, "keep" freezes them. New requests wait.
        With ``clear_cache`` the engine recomputes keys and values of frozen requests after it resumes. A second call does nothing."""
        ...

    async def resume_generation(self) -> None:
        """Let the engine go on. A second call does nothing."""
        ...

    async def is_paused(self) -> bool: ...

    async def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        """Forget cached keys and values. With the flag also forget those of running requests, which the engine then recomputes."""
        ...

    async def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None: ...

    async def start_weight_update(self) -> None: ...

    async def update_weights(self, update_info: Mapping[str, Any]) -> None: ...

    async def finish_weight_update(self, weight_version: str | None = None) -> None: ...

    async def shutdown_weight_transfer_engine(self) -> None: ...

    async def get_world_size(self, include_dp: bool = True) -> int: ...

    async def get_weight_version(self) -> str: ...

    async def update_weight_version(self, new_version: str) -> None:
        """Set the version that outputs carry. No weight is touched."""
        ...

    async def checksums(self) -> dict[str, str]:
        """Return the hex digest of each live parameter."""
        ...

    async def status(self) -> EngineStatus: ...

    async def shutdown(self) -> None:
        """End all requests and the engine. A second call does nothing."""
        ...
