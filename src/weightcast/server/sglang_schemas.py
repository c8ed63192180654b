"""Bodies of SGLang's native routes, with what its rollout clients send, and what of them this server does."""

from __future__ import annotations

from typing import Any

import msgspec

from weightcast.engines.sampling import MAX_SAMPLES, SamplingParams, StructuredOutputs
from weightcast.errors import InvalidInput, Unsupported

DEFAULT_NEW_TOKENS = 128


class SglangSampling(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``sampling_params`` of POST /generate; names and defaults are SGLang's."""

    n: int = 1
    max_new_tokens: int | None = DEFAULT_NEW_TOKENS
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    logit_bias: dict[str, float] | None = None
    json_schema: str | None = None
    regex: str | None = None
    sampling_seed: int | None = None

    def as_params(self, logprobs: int | None) -> SamplingParams:
        """The same, as this engine's parameters. InvalidInput names fields of this engine's."""
        wants_form = self.json_schema is not None or self.regex is not None
        form = StructuredOutputs(json=self.json_schema, regex=self.regex) if wants_form else None
        return SamplingParams(
            n=self.n, max_tokens=self.max_new_tokens, min_tokens=self.min_new_tokens, temperature=self.temperature,
            top_p=self.top_p, top_k=self.top_k, min_p=self.min_p, frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty, repetition_penalty=self.repetition_penalty,
            stop=tuple([self.stop] if isinstance(self.stop, str) else self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()), ignore_eos=self.ignore_eos,
            include_stop_str_in_output=self.no_stop_trim, skip_special_tokens=self.skip_special_tokens,
            logit_bias={_token(name): bias for name, bias in (self.logit_bias or {}).items()},
            structured_outputs=form, seed=self.sampling_seed, logprobs=logprobs,
        )  # fmt: skip


class GenerateBody(msgspec.Struct, kw_only=True):
    """POST /generate: one prompt, or several as a list."""

    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    sampling_params: SglangSampling | list[SglangSampling] | None = None
    rid: str | list[str] | None = None
    stream: bool = False
    return_logprob: bool | None = None
    logprob_start_len: int | None = None
    top_logprobs_num: int | None = None
    return_text_in_logprobs: bool = False
    lora_path: str | None = None
    image_data: Any = None
    return_hidden_states: bool = False

    @property
    def is_single(self) -> bool:
        """Whether the answer is one object and not a list."""
        if self.text is not None:
            return isinstance(self.text, str)
        return not (self.input_ids and isinstance(self.input_ids[0], list))

    def prompts(self) -> list[str | list[int]]:
        """The prompts in order; InvalidInput unless text or token ids are given."""
        if (self.text is None) == (self.input_ids is None) or not (self.text or self.input_ids):
            raise InvalidInput("give either text or input_ids", field="input_ids")
        if self.text is not None:
            return [self.text] if isinstance(self.text, str) else list(self.text)
        nested = [ids for ids in self.input_ids or () if isinstance(ids, list)]
        flat = [token for token in self.input_ids or () if isinstance(token, int)]
        if nested and flat:
            raise InvalidInput("input_ids are of one prompt, or lists of several", field="input_ids")
        return list(nested) if nested else [flat]

    def params(self, count: int) -> list[SamplingParams]:
        """The parameters of each of ``count`` prompts."""
        top = self.top_logprobs_num or 0
        logprobs = top if self.return_logprob else None
        given = self.sampling_params or SglangSampling()
        each = given if isinstance(given, list) else [given] * count
        if len(each) != count:
            raise InvalidInput(f"{len(each)} sampling_params for {count} prompts", field="sampling_params")
        if sum(params.n for params in each) > MAX_SAMPLES:
            raise InvalidInput(f"one request may want {MAX_SAMPLES} answers", field="sampling_params.n")
        return [params.as_params(logprobs) for params in each]

    def check_supported(self) -> None:
        """Raise Unsupported for what would be left out of the answer."""
        if self.logprob_start_len is not None and self.logprob_start_len >= 0 and self.return_logprob:
            raise Unsupported(
                "log-probabilities of a prompt are not in this dialect",
                hint="Leave logprob_start_len away, or ask /v1/completions with prompt_logprobs",
            )
        for name, value in (
            ("lora_path", self.lora_path),
            ("image_data", self.image_data),
            ("return_hidden_states", self.return_hidden_states),
        ):
            if value:
                raise Unsupported(f"{name} is not supported by this engine", hint="Leave the field away")


class SglangPause(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /pause_generation."""

    mode: str = "abort"


class SglangContinue(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /continue_generation."""

    torch_empty_cache: bool = True


class SglangAbort(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /abort_request."""

    rid: str = ""
    abort_all: bool = False
    abort_message: str | None = None


def _token(name: str) -> int:
    try:
        return int(name)
    except ValueError:
        raise InvalidInput(f"{name!r:.40} is no token id", field="sampling_params.logit_bias") from None
