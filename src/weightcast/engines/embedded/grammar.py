"""The form of an answer: which tokens may come next so that the output keeps to a JSON schema, a regular expression or a grammar.

A grammar follows the tokens of one sequence and nothing else. New weights, a cache that is computed anew and preemption leave it as it is.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from weightcast.engines.sampling import StructuredOutputs
from weightcast.errors import InvalidInput, Unsupported

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


_WHITE_SPACE = r"[ \t\r\n]{1,64}"
"""Between the parts of a JSON text a model may not go on with white space for ever."""


class Grammar:
    """A form of an answer, and how much of the form the tokens so far have filled."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def error(self) -> str:
        """Why the form cannot be followed any further; empty while it can."""
        return self._matcher.get_error()

    def allowed(self, vocab_size: int) -> torch.Tensor:
        """Return True for each token of the vocabulary that may come next. The end of the text may come only where the form is complete."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        flags = np.zeros(vocab_size, dtype=bool)
        found = np.unpackbits(bits, bitorder="little")[:vocab_size]
        flags[: len(found)] = found
        return torch.from_numpy(flags)

    def accept(self, token: int) -> bool:
        """Go on by a token that was sampled. Returns False when the form does not go on with this token; ``error`` says why."""
        return self._matcher.consume_token(token)

    def copy(self) -> Grammar:
        """Return the same form at the same place. The two are filled independently from then on."""
        return Grammar(self._matcher.deep_copy())


class Grammars:
    """Compiles forms for one tokenizer. The library and its view of the vocabulary are loaded when they are first needed."""

    def __init__(self, tokenizer: Any, eos: Iterable[int], vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._eos = sorted(eos)
        self._vocab_size = vocab_size
        self._loading = threading.Lock()
        self._loaded: LLTokenizer | None = None

    def compile(self, form: StructuredOutputs) -> Grammar:
        """Return a form at its beginning. InvalidInput when the form makes no sense. A large form takes long. Any thread may call."""
        tokenizer = self._vocabulary()
        from llguidance import LLMatcher

        try:
            matcher = LLMatcher(tokenizer, _written(form), log_level=0)
        except ValueError as error:
            raise InvalidInput(f"structured_outputs: {error}", field="structured_outputs") from None
        if matcher.is_error():
            reason = matcher.get_error().strip()
            raise InvalidInput(f"structured_outputs: {reason}", field="structured_outputs")
        return Grammar(matcher)

    def _vocabulary(self) -> LLTokenizer:
        with self._loading:
            if self._loaded is None:
                self._loaded = self._load()
            return self._loaded

    def _load(self) -> LLTokenizer:
        try:
            from llguidance import LLTokenizer
        except ImportError as error:
            raise Unsupported(
                "answers of a given form need llguidance", hint="Install it: pip install 'weightcast[grammar]'"
            ) from error
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None or not self._eos:
            lacks = "no end of text" if backend is not None else "no fast tokenizer"
            raise Unsupported(f"the served model has {lacks}: answers of a given form need one")
        size = max(self._vocab_size, backend.get_vocab_size(with_added_tokens=True))
        return LLTokenizer(backend.to_str(), n_vocab=size, eos_token=self._eos)


def _written(form: StructuredOutputs) -> str:
    """The form in llguidance's notation."""
    from llguidance import LLMatcher, grammar_from

    if form.json is not None:
        schema = form.json if isinstance(form.json, str) else json.dumps(form.json)
        return LLMatcher.grammar_from_json_schema(schema, {"whitespace_pattern": _WHITE_SPACE})
    if form.json_object:
        return LLMatcher.grammar_from_json_schema('{"type": "object"}', {"whitespace_pattern": _WHITE_SPACE})
    if form.regex is not None:
        return LLMatcher.grammar_from_regex(form.regex)
    if form.choice is not None:
        return LLMatcher.grammar_from_lark(
            "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in form.choice)
        )
    assert form.grammar is not None
    return grammar_from("grammar", form.grammar)
