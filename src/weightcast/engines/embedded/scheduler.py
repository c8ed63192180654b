"""Which tokens go into the next forward pass: every decoding sequence, then pieces of prompts, within a token budget.

Sequences wait in order of arrival. When the KV cache is full the newest running sequence gives its row back and waits
again, in front; its tokens stay, and their keys and values are computed anew. The oldest always gets on, so there is
no way to get stuck.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass

from weightcast.engines.embedded.kv import KvCache
from weightcast.engines.embedded.sequence import Sequence


@dataclass(slots=True, kw_only=True)
class Work:
    """The next ``count`` tokens of a sequence go into this step."""

    sequence: Sequence
    count: int

    @property
    def completes(self) -> bool:
        """True when the step ends with the sequence's last token, so that a new one is sampled."""
        return self.sequence.num_computed + self.count == len(self.sequence.tokens)


class Scheduler:
    """The sequences that run and those that wait, both with the oldest first. A sequence is in exactly one of the two until it finishes."""

    def __init__(self, cache: KvCache, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.cache = cache
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.num_preemptions = 0
        self._max_num_seqs = max_num_seqs
        self._max_tokens = max_num_batched_tokens

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_order)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence and free its row."""
        self.cache.release(sequence)
        (self.running if sequence in self.running else self.waiting).remove(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to wait. What was computed for the sequence is forgotten."""
        self.cache.release(sequence)
        self.running.remove(sequence)
        sequence.forget()
        insort(self.waiting, sequence, key=_order)

    def preempt_all(self) -> None:
        """Empty the cache. Nothing is lost but the computation."""
        for sequence in list(self.running):
            self.preempt(sequence)
        self.cache.trim()

    def schedule(self, epoch: int, admit: Callable[[Sequence], bool]) -> list[Work]:
        """Choose the work of the next step and find room for it. ``admit`` says of a waiting sequence whether it may start."""
        self._make_room()
        budget = self._max_tokens
        work: list[Work] = []
        decoding = [s for s in self.running if len(s.tokens) - s.num_computed == 1]
        filling = [s for s in self.running if len(s.tokens) - s.num_computed > 1]
        for sequence in decoding:
            work.append(Work(sequence=sequence, count=1))
            budget -= 1
        for sequence in filling:
            budget -= self._take(sequence, budget, work)
        self._admit(epoch, admit, budget, work)
        return work

    def _make_room(self) -> None:
        """Every running sequence gets a place for its next token, the newest ones giving way if they must."""
        for sequence in list(self.running):
            while sequence.shelf is not None and not self.cache.extend(sequence, len(sequence.tokens)):
                self.preempt(self.running[-1])
                self.num_preemptions += 1

    def _admit(self, epoch: int, admit: Callable[[Sequence], bool], budget: int, work: list[Work]) -> None:
        later: list[Sequence] = []
        queue = self.waiting
        at = 0
        try:
            while at < len(queue) and budget > 0 and len(self.running) < self._max_num_seqs:
                sequence = queue[at]
                leader = self._leader(sequence, epoch)
                if not admit(sequence) or (leader is not None and leader.num_computed < leader.num_prompt):
                    later.append(sequence)
                    at += 1
                    continue
                if not self.cache.place(sequence, min(len(sequence.tokens) + 1, self.cache.shelves[-1].room)):
                    break
                at += 1
                insort(self.running, sequence, key=_order)
                sequence.kv_epoch = epoch
                if leader is not None:
                    self._share_prompt(sequence, leader)
                budget -= self._take(sequence, budget, work)
        finally:
            self.waiting = later + queue[at:]

    def _leader(self, sequence: Sequence, epoch: int) -> Sequence | None:
        """A running sequence of the same request whose prompt's keys and values can be copied, now or soon."""
        known = sequence.request.prompt_logprobs
        scores_prompt = sequence.index == 0 and known is not None and len(known) < sequence.num_prompt
        if sequence.num_prompt < 2 or scores_prompt:
            return None
        able = [s for s in sequence.request.sequences if s.shelf is not None and s.kv_epoch == epoch]
        return max(able, key=lambda s: s.num_computed, default=None)

    def _share_prompt(self, sequence: Sequence, leader: Sequence) -> None:
        shared = sequence.num_prompt - 1
        self.cache.fork(sequence, leader, shared)
        sequence.num_computed = shared

    @staticmethod
    def _take(sequence: Sequence, budget: int, work: list[Work]) -> int:
        count = min(budget, len(sequence.tokens) - sequence.num_computed)
        if count > 0:
            work.append(Work(sequence=sequence, count=count))
        return count


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order
