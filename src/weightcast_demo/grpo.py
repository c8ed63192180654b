"""Group relative policy optimisation with the sampler's own log-probabilities, and the supervised warm-up before it."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any

import torch

from weightcast_demo import task
from weightcast_demo.policy import answer_logprobs, answer_scores, chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts:
    """Sampled answers, prompt by prompt: rows ``[i * group_size, (i + 1) * group_size)`` answer the same prompt.

    ``tokens``, ``logprobs`` and ``mask`` are [rows, longest answer]; where ``mask`` is False there is padding.
    """

    prompts: torch.Tensor
    tokens: torch.Tensor
    logprobs: torch.Tensor
    mask: torch.Tensor
    rewards: torch.Tensor
    group_size: int
    seconds: float
    """How long sampling took."""

    @property
    def num_tokens(self) -> int:
        return int(self.mask.sum())

    @property
    def mean_reward(self) -> float:
        return float(self.rewards.mean())


@dataclass(frozen=True, slots=True, kw_only=True)
class Warmth:
    """How the warm-up ended: steps taken, and the probability of a right answer that was reached."""

    steps: int
    probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """What one optimizer step saw, before it changed the weights; means are over the sampled tokens."""

    loss: float
    grad_norm: float
    clipped: float
    """Share of tokens whose ratio was clipped."""
    logprob_gap: float
    """Largest difference between the server's and the trainer's log-probability of one token; on-policy it is rounding only."""
    kl: float
    """Kullback-Leibler divergence from the warmed-up policy, in nats a token, by the estimator that is never negative."""
    entropy: float
    """Entropy of the policy's next token, in nats."""
    seconds: float


def advantages(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    """Rewards relative to their group, in the group's standard deviations; 0 where all of a group got the same."""
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    return (centred / (groups.std(dim=1, correction=0, keepdim=True) + 1e-4)).flatten()


def clipped_loss(
    new_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantage: torch.Tensor,
    mask: torch.Tensor,
    clip: float = 0.2,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The clipped surrogate loss over all tokens, and the share of tokens at which the clip held the ratio back."""
    ratio = (new_logprobs - old_logprobs).exp()
    weight = advantage.unsqueeze(-1)
    bounded = ratio.clamp(1 - clip, 1 + clip)
    gain = torch.minimum(ratio * weight, bounded * weight)
    count = mask.sum().clamp(min=1)
    clipped = ((bounded * weight < ratio * weight) & mask).sum() / count
    return -(gain * mask).sum() / count, clipped


def divergence(logprobs: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor) -> float:
    """The mean of ``exp(r) - 1 - r`` with ``r = reference - logprobs``, over tokens that were sampled with ``logprobs``.

    Its expectation is the Kullback-Leibler divergence from the reference, and no token's part of it is negative.
    """
    ratio = reference - logprobs
    return float(((ratio.exp() - 1 - ratio) * mask).sum() / mask.sum().clamp(min=1))


class Learner:
    """The trainer's model and optimizer. ``warm_up`` first, then ``step`` once for each batch of rollouts.

    The first step keeps a copy of the policy, from which later divergences count.
    """

    def __init__(self, model: Any, *, lr: float = 1e-4, warm_up_lr: float = 3e-3) -> None:
        self.model = model
        self.warm_up_lr = warm_up_lr
        self._optimizer = self._adam(lr)
        self._reference: Any = None

    def _adam(self, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)

    def warm_up(self, prompts: task.SortingDigits, *, enough: float, max_steps: int, batch: int = 256) -> Warmth:
        """Supervised steps until the policy answers rightly with probability ``enough`` (seen on fresh prompts).

        That probability is also the reward that sampling at temperature 1 is going to show. Stops at ``max_steps``.
        """
        optimizer = self._adam(self.warm_up_lr)
        likely, steps = 0.0, 0
        while steps < max_steps and likely < enough:
            questions = prompts.prompts(batch)
            logprobs = answer_logprobs(self.model, questions, task.answers(questions))
            likely = float(logprobs.detach().sum(dim=1).exp().mean())
            if likely < enough:
                _set_lr(optimizer, self.warm_up_lr * min(1.0, (steps + 1) / 10))
                self._apply(optimizer, -logprobs.mean())
                steps += 1
        return Warmth(steps=steps, probability=likely)

    def step(self, rollouts: Rollouts) -> StepStats:
        """One optimizer step on one batch; raises nothing for a batch without signal, its gradient is zero."""
        began = time.perf_counter()
        if self._reference is None:
            self._reference = copy.deepcopy(self.model).requires_grad_(False)
        scores = answer_scores(self.model, rollouts.prompts, rollouts.tokens)
        logprobs = chosen(scores, rollouts.tokens)
        with torch.no_grad():
            reference = answer_logprobs(self._reference, rollouts.prompts, rollouts.tokens)
            entropy = -(scores.exp() * scores).sum(-1)
        gap = ((logprobs.detach() - rollouts.logprobs).abs() * rollouts.mask).max()
        advantage = advantages(rollouts.rewards, rollouts.group_size)
        loss, clipped = clipped_loss(logprobs, rollouts.logprobs, advantage, rollouts.mask)
        norm = self._apply(self._optimizer, loss)
        return StepStats(
            loss=float(loss.detach()),
            grad_norm=norm,
            clipped=float(clipped),
            logprob_gap=float(gap),
            kl=divergence(logprobs.detach(), reference, rollouts.mask),
            entropy=float((entropy * rollouts.mask).sum() / rollouts.mask.sum().clamp(min=1)),
            seconds=time.perf_counter() - began,
        )

    def _apply(self, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> float:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        optimizer.step()
        return float(norm)


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
