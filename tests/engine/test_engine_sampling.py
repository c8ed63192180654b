"""Sampling: the processed distribution, log-probabilities, seeds that ignore the batch."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_reference import random_prompts

from weightcast.engines.embedded import SamplingParams
from weightcast.engines.embedded.sampler import sample
from weightcast.errors import InvalidInput


def _row(params: SamplingParams, seed: int, tokens: tuple[int, ...] = ()) -> Any:
    return SimpleNamespace(
        params=params,
        greedy=params.temperature < 1e-5,
        rng=random.Random(seed),
        tokens=list(tokens),
        num_prompt=len(tokens),
        num_output=0,
        grammar=None,
    )


def _expected(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The processed distribution of one row, written down step by step."""
    probs = torch.softmax(logits.double() / params.temperature, dim=0)
    kept = probs >= params.min_p * probs.max()
    order = sorted(range(len(probs)), key=lambda i: (not bool(kept[i]), -float(probs[i])))
    if params.top_k > 0:
        order = order[: params.top_k]
    order = [i for i in order if kept[i]]
    total = sum(float(probs[i]) for i in order)
    before, chosen = 0.0, []
    for i in order:
        if chosen and before >= params.top_p:
            break
        chosen.append(i)
        before += float(probs[i]) / total
    out = torch.zeros_like(probs)
    out[chosen] = probs[chosen] / probs[chosen].sum()
    return out


@pytest.mark.parametrize("vocab", [50, 700])
@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.0},
        {"temperature": 0.6, "top_p": 0.8},
        {"temperature": 1.7, "top_k": 7},
        {"temperature": 1.2, "min_p": 0.05},
        {"temperature": 3.0, "top_k": 30, "top_p": 0.9, "min_p": 0.01},
        {"temperature": 5.0, "top_p": 0.999},
        {"temperature": 1.0, "top_p": 1e-9},
    ],
)
def test_processed_distribution(fields: dict[str, Any], vocab: int, rng: random.Random) -> None:
    params = SamplingParams(**fields, logprobs=vocab)
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(rng.getrandbits(31)), dtype=torch.float64)
    logits *= 2
    expected = _expected(logits, params)
    found = sample(logits[None], [_row(params, 1)], [()])[0]
    probs = torch.zeros(vocab, dtype=torch.float64)
    for token, logprob in found.top:
        probs[token] = torch.tensor(logprob, dtype=torch.float64).exp()
    assert torch.allclose(probs, expected, atol=1e-9)
    assert expected[found.token] > 0
    assert found.logprob == pytest.approx(float(expected[found.token].log()), abs=1e-9)
    assert found.rank == 1 + int((expected > expected[found.token]).sum())


def test_frequencies_follow_the_distribution(rng: random.Random) -> None:
    params = SamplingParams(temperature=0.8, top_k=6)
    logits = torch.randn(12, generator=torch.Generator().manual_seed(rng.getrandbits(31)))
    expected = _expected(logits, params)
    num_rows = 20000
    rows = [_row(params, rng.getrandbits(60)) for _ in range(num_rows)]
    drawn = sample(logits.expand(num_rows, -1), rows, [()] * num_rows)
    counts = torch.bincount(torch.tensor([each.token for each in drawn]), minlength=12).double()
    assert torch.all(counts[expected == 0] == 0)
    error = (counts / num_rows - expected).abs()
    assert torch.all(error < 6 * (expected * (1 - expected) / num_rows).sqrt() + 1e-9)


def test_bans_and_penalties() -> None:
    logits = torch.tensor([[2.0, 1.9, 1.0, -1.0]])
    greedy = SamplingParams(temperature=0)
    assert sample(logits, [_row(greedy, 1)], [(0, 1, 99)])[0].token == 2
    penal = SamplingParams(temperature=0, repetition_penalty=1.5)
    assert sample(logits, [_row(penal, 1, (0, 3, 0))], [()])[0].token == 1
    assert torch.equal(logits, torch.tensor([[2.0, 1.9, 1.0, -1.0]]))


def test_broken_logits_are_noticed() -> None:
    logits = torch.tensor([[1.0, float("nan"), 0.0], [1.0, 3.0, 0.0]])
    for params in (SamplingParams(temperature=0), SamplingParams(seed=3)):
        assert [each.finite for each in sample(logits, [_row(params, 1)] * 2, [()] * 2)] == [False, True]


def test_seeds_ignore_the_batch(build: Any, start: Any, rng: random.Random) -> None:
    folder, reference = build("qwen3")
    prompts = random_prompts(rng, 10, reference.config.vocab_size)
    params = [
        SamplingParams(
            seed=rng.randrange(-(2**63), 2**64), max_tokens=12, n=rng.randint(1, 3), top_p=0.9, temperature=1.3
        )
        for _ in prompts
    ]
    together = start(folder, max_num_seqs=64).generate(prompts, params)
    narrow = start(folder, max_num_seqs=2, max_num_batched_tokens=9, seed=99)
    reordered = list(zip(prompts, params, together, strict=True))
    rng.shuffle(reordered)
    alone = narrow.generate([each[0] for each in reordered], [each[1] for each in reordered])
    for (_, param, expected), got in zip(reordered, alone, strict=True):
        assert [each.token_ids for each in got.outputs] == [each.token_ids for each in expected.outputs]
        assert len({tuple(each.token_ids) for each in got.outputs}) == param.n


def test_requests_without_a_seed_differ(build: Any, start: Any) -> None:
    folder, _ = build("qwen3")
    llm = start(folder, seed=4)
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    first, second = (each.outputs[0].token_ids for each in llm.generate([[5, 6], [5, 6]], params))
    assert first != second
    again = start(folder, seed=4).generate([[5, 6]], params)[0].outputs[0].token_ids
    assert again == first


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logprobs_equal_a_reference_forward(temperature: float, build: Any, start: Any, rng: random.Random) -> None:
    folder, reference = build("qwen3")
    vocab = reference.config.vocab_size
    prompts = random_prompts(rng, 5, vocab)
    params = SamplingParams(
        temperature=temperature, max_tokens=9, seed=rng.getrandbits(40), logprobs=3, prompt_logprobs=2, n=2
    )
    llm = start(folder, max_num_seqs=3, max_num_batched_tokens=17)
    for prompt, output in zip(prompts, llm.generate(prompts, params), strict=True):
        for each in output.outputs:
            with torch.no_grad():
                raw = reference(torch.tensor([prompt + each.token_ids])).logits[0].double()
            made = torch.log_softmax(raw[len(prompt) - 1 : -1] / (temperature or 1.0), dim=-1)
            assert each.logprobs is not None
            for row, token, entry in zip(made, each.token_ids, each.logprobs, strict=True):
                _check_entry(row, token, entry, 3)
            total = sum(float(row[token]) for row, token in zip(made, each.token_ids, strict=True))
            assert each.cumulative_logprob == pytest.approx(total, abs=1e-4)
        assert output.prompt_logprobs is not None
        assert len(output.prompt_logprobs) == len(prompt)
        assert output.prompt_logprobs[0] is None
        scored = torch.log_softmax(raw[: len(prompt) - 1], dim=-1)
        for row, token, entry in zip(scored, prompt[1:], output.prompt_logprobs[1:], strict=True):
            _check_entry(row, token, entry, 2)


TOLERANCE = 1e-4
"""The engine computes in float32 what the reference is compared in: values nearer than this may change places."""


def _check_entry(row: torch.Tensor, token: int, entry: Any, num_top: int) -> None:
    last = torch.topk(row, num_top).values[-1]
    assert {token, *torch.nonzero(row > last + TOLERANCE).flatten().tolist()} <= set(entry)
    assert all(row[each] > last - TOLERANCE for each in entry if each != token)
    assert len(entry) == num_top + (entry[token].rank > num_top)
    for each, logprob in entry.items():
        assert logprob.logprob == pytest.approx(float(row[each]), abs=TOLERANCE)
        above, below = int((row > row[each] + TOLERANCE).sum()), int((row < row[each] - TOLERANCE).sum())
        assert above < logprob.rank <= len(row) - below
        assert isinstance(logprob.decoded_token, str)


def test_logprobs_zero_means_the_sampled_token(build: Any, start: Any) -> None:
    folder, _ = build("qwen3")
    outputs = start(folder).generate([[7, 8, 9]], SamplingParams(max_tokens=5, logprobs=0, seed=1))[0].outputs[0]
    assert [list(each) for each in outputs.logprobs] == [[token] for token in outputs.token_ids]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -2),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-308),
        ("repetition_penalty", 1e300),
        ("presence_penalty", 2.1),
        ("frequency_penalty", float("nan")),
        ("logit_bias", {5: 100.5}),
        ("logit_bias", {5: True}),
        ("logit_bias", {"x": 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", [5]),
        ("structured_outputs", "json"),
        ("seed", 2**64),
        ("seed", "7"),
        ("max_tokens", 0),
        ("min_tokens", 17),
        ("logprobs", -1),
        ("prompt_logprobs", 1.5),
        ("stop", ("",)),
        ("stop", 5),
        ("stop_token_ids", (-1,)),
        ("ignore_eos", 1),
    ],
)
def test_bad_params_name_the_field(field: str, value: Any) -> None:
    with pytest.raises(InvalidInput) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field


def test_params_are_normalised() -> None:
    params = SamplingParams(stop="ab", stop_token_ids=[3, 4])  # type: ignore[arg-type]
    assert params.stop == ("ab",)
    assert params.stop_token_ids == (3, 4)
    assert SamplingParams(stop=None).stop == ()  # type: ignore[arg-type]
