"""Completions of vLLM's API as the conformance suite of engines takes them."""

from __future__ import annotations

from collections.abc import Iterator

from weightcast.testing.engine_suite import Answer
from weightcast.testing.vllm_server import Served


def streamed(served: Served, ids: list[int], num_tokens: int) -> Iterator[Answer]:
    """The greedy answer as it grows. vLLM's own servers say nothing of versions."""
    tokens: list[int] = []
    for choice in served.stream(ids, num_tokens):
        tokens += choice["token_ids"] or []
        spans = choice.get("weight_versions")
        yield Answer(
            tokens=list(tokens),
            finish_reason=choice["finish_reason"],
            spans=spans and [(span["version"], span["start"], span["end"]) for span in spans],
        )
