"""The learner: advantages, the clipped loss, warm-up and steps."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from weightcast_demo import task
from weightcast_demo.grpo import Learner, Rollouts, advantages, clipped_loss, divergence
from weightcast_demo.policy import answer_logprobs, build_policy


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rollouts_of(model: torch.nn.Module, seed: int, *, num_prompts: int = 4, group_size: int = 6) -> Rollouts:
    """Answers of random digits, every other one right; log-probabilities of the model itself."""
    prompts = task.SortingDigits(seed).prompts(num_prompts).repeat_interleave(group_size, dim=0)
    tokens = torch.randint(0, 10, (len(prompts), task.NUM_DIGITS + 1), generator=generator(seed))
    tokens[::2] = task.answers(prompts)[::2]
    rewards = [task.reward(p, t) for p, t in zip(prompts.tolist(), tokens.tolist(), strict=True)]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1::2, -2:] = False
    with torch.no_grad():
        logprobs = answer_logprobs(model, prompts, tokens) * mask
    return Rollouts(
        prompts=prompts,
        tokens=tokens,
        logprobs=logprobs,
        mask=mask,
        rewards=torch.tensor(rewards),
        group_size=group_size,
        seconds=1.0,
    )


def test_advantages_against_each_group_by_itself() -> None:
    rewards = torch.rand(24, generator=generator(51))
    result = advantages(rewards, 6).tolist()
    for start in range(0, 24, 6):
        group = rewards[start : start + 6].tolist()
        mean, deviation = statistics.fmean(group), statistics.pstdev(group)
        expected = [(value - mean) / (deviation + 1e-4) for value in group]
        assert result[start : start + 6] == pytest.approx(expected, abs=1e-5)


def test_a_group_of_equal_rewards_teaches_nothing() -> None:
    result = advantages(torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0]), 3)
    assert result.tolist() == [0.0] * 6


def test_clipped_loss_token_by_token() -> None:
    rng = generator(52)
    new, old = -torch.rand(5, 7, generator=rng) * 2, -torch.rand(5, 7, generator=rng) * 2
    advantage = torch.randn(5, generator=rng)
    mask = torch.rand(5, 7, generator=rng) > 0.3
    loss, clipped = clipped_loss(new, old, advantage, mask)
    total, held = 0.0, 0
    for row in range(5):
        for place in range(7):
            if mask[row, place]:
                ratio = math.exp(float(new[row, place] - old[row, place]))
                gains = ratio * float(advantage[row]), min(max(ratio, 0.8), 1.2) * float(advantage[row])
                total += min(gains)
                held += gains[1] < gains[0]
    assert loss.item() == pytest.approx(-total / int(mask.sum()), abs=1e-5)
    assert clipped.item() == pytest.approx(held / int(mask.sum()), abs=1e-6)
    assert held > 0


def test_a_step_makes_rewarded_answers_likelier() -> None:
    model = build_policy(53)
    rollouts = rollouts_of(model, 53)
    stats = Learner(model, lr=1e-3).step(rollouts)
    with torch.no_grad():
        gained = ((answer_logprobs(model, rollouts.prompts, rollouts.tokens) - rollouts.logprobs) * rollouts.mask).sum(
            1
        )
    assert gained[rollouts.rewards == 1].mean() > gained[rollouts.rewards == 0].mean()
    assert stats.logprob_gap < 1e-4
    assert stats.clipped == 0.0, "the first step on fresh rollouts clips nothing"
    assert stats.grad_norm > 0


def test_the_gap_shows_one_wrong_logprob_and_ignores_padding() -> None:
    model = build_policy(54)
    rollouts = rollouts_of(model, 54)
    rollouts.logprobs[1, -1] = 99.0  # padding
    rollouts.logprobs[2, 3] += 0.25
    assert Learner(model).step(rollouts).logprob_gap == pytest.approx(0.25, abs=1e-3)


@torch.no_grad()
def distributions(model: torch.nn.Module, rollouts: Rollouts) -> torch.Tensor:
    """The model's next-token probabilities at each place of the answers, in float64."""
    text = torch.cat([rollouts.prompts, rollouts.tokens], dim=1)
    logits = model(input_ids=text, use_cache=False).logits[:, rollouts.prompts.shape[1] - 1 : -1]
    return logits.double().softmax(-1)


def test_entropy_and_divergence_are_those_of_the_distributions() -> None:
    model = build_policy(58)
    learner = Learner(model, lr=3e-3)
    rollouts = rollouts_of(model, 58)
    start = distributions(model, rollouts)
    first = learner.step(rollouts)
    assert first.kl == 0.0, "before its first step the policy is the one that it is compared with"
    now = distributions(model, rollouts)
    second = learner.step(rollouts)
    for stats, probabilities in ((first, start), (second, now)):
        entropy = -(probabilities * probabilities.log()).sum(-1)
        assert stats.entropy == pytest.approx(entropy[rollouts.mask].mean().item(), abs=1e-4)
    ratio = (start / now).gather(-1, rollouts.tokens.unsqueeze(-1)).squeeze(-1)[rollouts.mask]
    assert second.kl == pytest.approx((ratio - 1 - ratio.log()).mean().item(), rel=1e-3)
    assert second.kl > 1e-5


def test_the_divergence_of_samples_is_that_of_their_distributions() -> None:
    rng = generator(59)
    now, start = (torch.randn(7, generator=rng).log_softmax(-1) for _ in range(2))
    tokens = torch.multinomial(now.exp(), 200_000, replacement=True, generator=rng)
    exact = (now.exp() * (now - start)).sum().item()
    estimate = divergence(now[tokens], start[tokens], torch.ones(len(tokens), dtype=torch.bool))
    assert estimate == pytest.approx(exact, rel=0.05)


def test_warm_up_stops_when_warm_or_at_its_limit() -> None:
    model = build_policy(55)
    cold = Learner(model).warm_up(task.SortingDigits(55), enough=2.0, max_steps=6, batch=64)
    assert cold.steps == 6
    enough = cold.probability * 50
    warmer = Learner(model).warm_up(task.SortingDigits(56), enough=enough, max_steps=200, batch=64)
    assert 0 < warmer.steps < 200
    assert warmer.probability >= enough
    assert Learner(model).warm_up(task.SortingDigits(57), enough=0.0, max_steps=5, batch=64).steps == 0
