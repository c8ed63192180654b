"""Pieces: what an answer says of each of its choices, as a whole or as the news since the last chunk."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from weightcast.engines.base import CompletionOutput, RequestOutput, SamplingParams
from weightcast.server import logprobs
from weightcast.server.prompts import PromptItem, prompt_text
from weightcast.server.schemas import GenerationRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A request that is ready for the engine."""

    id: str
    names: tuple[str, ...]
    """Ids by which /abort_requests knows it."""
    created: int
    model: str
    prompts: list[PromptItem]
    params: SamplingParams
    request: GenerationRequest
    tokenizer: Any
    adapter: str | None = None
    """The adapter that it runs on, as the request names it; None: the model itself."""
    echo: bool = False
    """The prompt stands in front of every answer."""
    echo_only: bool = False
    """Nothing is wanted but the prompt; the one token that the engine samples is not shown."""

    def shown(self, prompt: RequestOutput) -> RequestOutput:
        """What the request wants to see of an engine's output."""
        if not self.echo_only:
            return prompt
        outputs = [
            replace(
                output,
                text="",
                token_ids=[],
                logprobs=None if output.logprobs is None else [],
                weight_versions=[],
                stop_reason=None,
                finish_reason="length" if output.finish_reason == "stop" else output.finish_reason,
            )
            for output in prompt.outputs
        ]
        return replace(prompt, outputs=outputs)

    def may_begin(self, prompt: RequestOutput) -> bool:
        """False while log-probabilities of a prompt that is echoed are still computed."""
        known = prompt.prompt_logprobs
        return not self.echo or known is None or prompt.finished or len(known) == len(prompt.prompt_token_ids)

    def text_of(self, token: int) -> str:
        """The text of one token of a prompt."""
        return prompt_text([token], self.tokenizer)

    @property
    def as_ids(self) -> bool:
        return bool(self.request.return_tokens_as_token_ids)

    @property
    def wants_ids(self) -> bool:
        return bool(self.request.return_token_ids)

    @property
    def include_usage(self) -> bool:
        options = self.request.stream_options
        return options is not None and bool(options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        options = self.request.stream_options
        return options is not None and bool(options.continuous_usage_stats)


@dataclass(slots=True, kw_only=True)
class Piece:
    """What one choice says now: everything in a whole answer, the news in a chunk."""

    index: int
    first: bool
    prompt: RequestOutput
    output: CompletionOutput
    text: str
    token_ids: list[int]
    scored_ids: list[int]
    """The tokens that ``logprobs`` are about: those of a prompt that is echoed, then ``token_ids``."""
    logprobs: list[Any] | None
    text_offset: int


@dataclass(slots=True)
class Sent:
    """How much of one choice went out in chunks so far."""

    num_tokens: int = 0
    num_chars: int = 0
    text_offset: int = 0
    started: bool = False
    finished: bool = False


@dataclass(slots=True)
class Progress:
    """What a stream has sent so far, by choice, and the newest state of every prompt."""

    sent: dict[int, Sent] = field(default_factory=dict)
    newest: dict[int, RequestOutput] = field(default_factory=dict)


def usage(prompts: list[RequestOutput]) -> dict[str, int]:
    """Token counts over all prompts and outputs."""
    num_prompt = sum(len(prompt.prompt_token_ids) for prompt in prompts)
    num_output = sum(len(output.token_ids) for prompt in prompts for output in prompt.outputs)
    return {"prompt_tokens": num_prompt, "completion_tokens": num_output, "total_tokens": num_prompt + num_output}


def choice_extras(job: Job, piece: Piece) -> dict[str, Any]:
    """Fields that both dialects add to a choice: why it ended, its token ids, and the versions that produced it."""
    output = piece.output
    extras: dict[str, Any] = {"finish_reason": output.finish_reason, "stop_reason": output.stop_reason}
    if job.wants_ids:
        extras["token_ids"] = piece.token_ids
    if output.finish_reason is not None:
        extras["weight_versions"] = output.weight_versions
        if piece.prompt.adapter is not None:
            extras["adapter"] = piece.prompt.adapter
    return extras


def whole_piece(job: Job, index: int, prompt: RequestOutput, output: CompletionOutput) -> Piece:
    """Everything about one choice."""
    return _piece(job, index, prompt, output, Sent())


def news(job: Job, number: int, prompt: RequestOutput, progress: Progress) -> list[Piece]:
    """Pieces worth a chunk. Tokens without visible text wait for the next one unless the request wants to see tokens."""
    if not job.may_begin(prompt):
        return []
    pieces = []
    shows_tokens = job.wants_ids or job.params.logprobs is not None
    for output in prompt.outputs:
        index = number * job.params.n + output.index
        sent = progress.sent.setdefault(index, Sent())
        piece = _piece(job, index, prompt, output, sent)
        ends = output.finish_reason is not None and not sent.finished
        if not (piece.text or ends or (shows_tokens and piece.token_ids)):
            continue
        pieces.append(piece)
        sent.started, sent.finished = True, ends
        sent.num_chars, sent.num_tokens = len(output.text), len(output.token_ids)
        if piece.logprobs is not None:
            sent.text_offset += logprobs.text_length(piece.scored_ids, piece.logprobs, job.text_of)
    return pieces


def _piece(job: Job, index: int, prompt: RequestOutput, output: CompletionOutput, sent: Sent) -> Piece:
    """What was not sent yet. The first piece of an echo begins with the prompt."""
    text, token_ids = output.text[sent.num_chars :], list(output.token_ids[sent.num_tokens :])
    scored: list[int] = token_ids
    entries: list[Any] | None = None
    if output.logprobs is not None:
        entries = list(output.logprobs[sent.num_tokens : sent.num_tokens + len(token_ids)])
    if job.echo and not sent.started:
        text = (prompt_text(prompt.prompt_token_ids, job.tokenizer) if prompt.prompt is None else prompt.prompt) + text
        if entries is not None and prompt.prompt_logprobs is not None:
            known = prompt.prompt_logprobs
            scored, entries = [*prompt.prompt_token_ids[: len(known)], *token_ids], [*known, *entries]
    return Piece(
        index=index,
        first=not sent.started,
        prompt=prompt,
        output=output,
        text=text,
        token_ids=token_ids,
        scored_ids=scored,
        logprobs=entries,
        text_offset=sent.text_offset,
    )
