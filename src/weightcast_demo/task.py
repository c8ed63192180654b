"""The task: sort digits. ``^83512907=`` is answered by ``01235789.``; the reward is 1 for exactly that, else 0."""

from __future__ import annotations

from collections.abc import Sequence

import torch

ALPHABET = "0123456789^=._?"
"""The 15 characters; a character's token id is its place. ``^`` begins, ``=`` asks, ``.`` ends, ``_`` pads, ``?`` is unknown."""

BEGIN, ASK, END, PAD, UNKNOWN = (ALPHABET.index(character) for character in "^=._?")
NUM_DIGITS = 8


def encode(text: str) -> list[int]:
    """Token ids of a text; characters outside the alphabet are UNKNOWN."""
    return [ALPHABET.find(character) if character in ALPHABET else UNKNOWN for character in text]


def decode(token_ids: Sequence[int]) -> str:
    """The text of token ids."""
    return "".join(ALPHABET[token] for token in token_ids)


class SortingDigits:
    """An endless stream of prompts of ``num_digits`` digits; equal seeds give equal streams."""

    def __init__(self, seed: int, num_digits: int = NUM_DIGITS) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._num_digits = num_digits

    def prompts(self, count: int) -> torch.Tensor:
        """``count`` prompts as token ids, int64 [count, num_digits + 2]."""
        digits = torch.randint(0, 10, (count, self._num_digits), generator=self._generator)
        begin = torch.full((count, 1), BEGIN)
        ask = torch.full((count, 1), ASK)
        return torch.cat([begin, digits, ask], dim=1)


def answers(prompts: torch.Tensor) -> torch.Tensor:
    """The right answers, int64 [count, num_digits + 1]."""
    digits = prompts[:, 1:-1].sort(dim=1).values
    return torch.cat([digits, torch.full((len(prompts), 1), END)], dim=1)


def reward(prompt: Sequence[int], answer: Sequence[int]) -> float:
    """1.0 for exactly the sorted digits and the end sign, else 0.0."""
    return float(list(answer) == [*sorted(prompt[1:-1]), END])


def accuracy(prompts: Sequence[Sequence[int]], given: Sequence[Sequence[int]]) -> float:
    """Share of prompts that were answered rightly."""
    return sum(reward(prompt, answer) for prompt, answer in zip(prompts, given, strict=True)) / len(prompts)
