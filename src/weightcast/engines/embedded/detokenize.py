"""Text of a growing list of tokens, in steps that only ever add to it, and the search for stop strings.

Tokens are pieces of bytes: a character may need several, and a token's text may depend on the one before it. New
text is therefore the difference of two decodings that share a prefix, and is held back while it ends inside a character.
The DecodeStream of the package tokenizers is as fast and no substitute: it holds broken bytes back for ever, in a time that grows with
the square of their number (13 s for 3,000 tokens), and gives out the end of a prompt that stops inside a character.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]

_UNFINISHED = "\ufffd"
_MAX_HELD_TOKENS = 16
"""No character needs more: text that still ends in a replacement character then really has one."""


class Detokenizer:
    """Decodes one sequence's output. ``decode`` turns token ids to text."""

    def __init__(self, decode: Decode, prompt_tail: Sequence[int], stop: Sequence[str], *, include_stop: bool) -> None:
        self._decode = decode
        self._tokens = list(prompt_tail)
        self._prefix = 0
        self._read = len(self._tokens)
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._held_back = 0 if include_stop or not stop else max(map(len, stop)) - 1
        self.text = ""

    @property
    def visible(self) -> str:
        """The text so far that no later stop string can take back."""
        return self.text[: max(0, len(self.text) - self._held_back)]

    def add(self, token: int, *, search: bool = True) -> str | None:
        """Add a token; returns the stop string that ended the text, if one did (the text is then cut)."""
        self._tokens.append(token)
        added = self._added(final=False)
        return self._cut_at_stop(added) if search and added else None

    def finish(self, tokens: Sequence[int] = (), *, search: bool = True) -> str | None:
        """Add the last tokens and whatever was held back. Returns a stop string found in that, if one was."""
        self._tokens.extend(tokens)
        added = self._added(final=True)
        self._held_back = 0
        return self._cut_at_stop(added) if search and added else None

    def _added(self, *, final: bool) -> str:
        before = self._decode(self._tokens[self._prefix : self._read])
        after = self._decode(self._tokens[self._prefix :])
        held = len(self._tokens) - self._read
        if len(after) <= len(before) and not final:
            return ""
        if after.endswith(_UNFINISHED) and held < _MAX_HELD_TOKENS and not final:
            return ""
        added = after[len(before) :]
        self._prefix, self._read = self._read, len(self._tokens)
        self.text += added
        return added

    def _cut_at_stop(self, added: str) -> str | None:
        found: tuple[int, str] | None = None
        for stop in self._stop:
            start = max(0, len(self.text) - len(added) - len(stop) + 1)
            at = self.text.find(stop, start)
            if at >= 0 and (found is None or at < found[0]):
                found = (at, stop)
        if found is None:
            return None
        at, stop = found
        self.text = self.text[: at + len(stop)] if self._include_stop else self.text[:at]
        self._held_back = 0
        return stop
