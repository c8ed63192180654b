"""Penalties, biases and forms of answers: their arithmetic beside transformers' own logits, also where weights change midway."""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
import random
import re
import sys
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import torch

from weightcast.engines.embedded import AsyncLLM, RequestOutput, SamplingParams, StructuredOutputs
from weightcast.errors import InvalidInput, Unsupported
from weightcast.testing.tokenizer import EOS_ID, build_tokenizer

Start = Callable[..., tuple[AsyncLLM, Any]]


@pytest.fixture
async def serve(build: Any) -> AsyncIterator[Start]:
    engines: list[AsyncLLM] = []

    def start(**arguments: Any) -> tuple[AsyncLLM, Any]:
        folder, reference = build("qwen3")
        engines.append(AsyncLLM(folder, num_threads=1, **arguments))
        return engines[-1], reference

    yield start
    for engine in engines:
        await engine.shutdown()


async def across_an_update(llm: AsyncLLM, prompt: list[int], params: SamplingParams, noise: Any) -> RequestOutput:
    """The request's output when the weights change after some of its tokens and everything is computed anew."""
    core, asked, steps = llm.engine.core, threading.Event(), itertools.count(1)
    step, output = core.step, None

    def hold_after_eight() -> None:
        """However slow this machine is, the request is not over before the pause is asked for."""
        step()
        if next(steps) == 8:
            assert asked.wait(60)

    core.step = hold_after_eight  # type: ignore[method-assign]
    async for output in llm.generate(prompt, params):
        if len(output.outputs[0].token_ids) > 5 and not asked.is_set():
            pausing = asyncio.create_task(llm.pause_generation("keep"))
            await asyncio.sleep(0)  # the order is in the engine's queue
            asked.set()
            await pausing
            await llm.run_between_steps(lambda: noise(llm.engine.model))
            await llm.update_weight_version("new")
            await llm.resume_generation()
    assert output is not None
    return output


def noise_of(seed: int) -> Callable[[Any], None]:
    def add(model: Any) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter += 0.05 * noise.to(parameter.device)

    return add


def processed(raw: torch.Tensor, prompt: list[int], output: list[int], params: SamplingParams) -> torch.Tensor:
    """Logits as the documents of OpenAI and vLLM define them, token by token."""
    logits = [float(value) for value in raw]
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    for token in {*prompt, *output}:
        value = logits[token]
        logits[token] = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
    for token in set(output):
        logits[token] -= params.frequency_penalty * output.count(token)
        logits[token] -= params.presence_penalty
    return torch.tensor(logits, dtype=torch.float64) / (params.temperature or 1.0)


PENALTIES = [
    {"presence_penalty": 1.3},
    {"frequency_penalty": 0.4},
    {"frequency_penalty": -1.1, "temperature": 0.8},
    {"repetition_penalty": 1.7, "presence_penalty": -0.5, "frequency_penalty": 0.9, "temperature": 1.3},
    {"logit_bias": {7: 4.0, 8: -100.0, 9: 3.5}, "repetition_penalty": 0.8, "presence_penalty": 0.7},
]


@pytest.mark.parametrize("fields", PENALTIES, ids=["presence", "frequency", "negative", "all", "bias"])
async def test_penalties_are_those_of_a_direct_computation(serve: Start, rng: random.Random, fields: Any) -> None:
    llm, old = serve()
    seed = rng.getrandbits(31)
    new = copy.deepcopy(old)
    noise_of(seed)(new)
    prompt = [rng.randrange(256) for _ in range(12)]
    params = SamplingParams(
        **{"temperature": 0.0, **fields}, max_tokens=40, ignore_eos=True, logprobs=4, seed=rng.getrandbits(30)
    )
    made = (await across_an_update(llm, prompt, params, noise_of(seed))).outputs[0]
    assert [span.version for span in made.weight_versions] == ["default", "new"]
    border = made.weight_versions[1].start
    assert 5 < border < 40
    assert made.logprobs is not None
    altered = 0.0
    with torch.no_grad():
        raw = [model(torch.tensor([prompt + made.token_ids])).logits[0].double() for model in (old, new)]
    for at, (token, entry) in enumerate(zip(made.token_ids, made.logprobs, strict=True)):
        row = raw[at >= border][len(prompt) - 1 + at]
        expected = torch.log_softmax(processed(row, prompt, made.token_ids[:at], params), dim=-1)
        fourth = float(torch.topk(expected, 4).values[-1])
        likeliest = {each for each, value in enumerate(expected.tolist()) if value > fourth + 1e-4}
        assert likeliest <= set(entry), "but for tokens that are as likely as the fourth"
        for each, logprob in entry.items():
            assert logprob.logprob == pytest.approx(float(expected[each]), abs=1e-4)
            altered = max(altered, abs(float(expected[each] - torch.log_softmax(row, dim=-1)[each])))
        if params.temperature == 0:
            assert token == int(expected.argmax())
    assert altered > 1e-3  # well above what is taken for equal


async def test_a_bias_forbids_and_forces(serve: Start, rng: random.Random) -> None:
    llm, reference = serve()
    forced = rng.randrange(3, 256)
    params = SamplingParams(logit_bias={forced: 100.0}, max_tokens=5, seed=1)
    output = [each async for each in llm.generate([5, 6], params)][-1]
    assert output.outputs[0].token_ids == [forced] * 5
    beyond = SamplingParams(logit_bias={reference.config.vocab_size: 1.0})
    with pytest.raises(InvalidInput, match="not in the vocabulary") as caught:
        _ = [each async for each in llm.generate([5, 6], beyond)]
    assert caught.value.field == "logit_bias"


async def test_a_form_is_kept_across_an_update(serve: Start, rng: random.Random) -> None:
    """The digits are single tokens, so what was left to sample from is known: its log-probabilities are computed directly."""
    llm, old = serve()
    seed = rng.getrandbits(31)
    new = copy.deepcopy(old)
    noise_of(seed)(new)
    prompt = [rng.randrange(256) for _ in range(9)]
    params = SamplingParams(
        structured_outputs=StructuredOutputs(regex="[0-9]{30}"), max_tokens=90, logprobs=2, seed=rng.getrandbits(30),
        presence_penalty=0.6, ignore_eos=True,
    )  # fmt: skip
    made = (await across_an_update(llm, prompt, params, noise_of(seed))).outputs[0]
    assert re.fullmatch("[0-9]{30}", made.text)
    assert made.finish_reason == "stop"
    assert made.token_ids[-1] == EOS_ID
    assert len(made.token_ids) == 31
    assert made.logprobs is not None
    border = made.weight_versions[1].start
    digits = build_tokenizer().convert_tokens_to_ids(list("0123456789"))
    with torch.no_grad():
        raw = [model(torch.tensor([prompt + made.token_ids])).logits[0].double() for model in (old, new)]
    for at, (token, entry) in enumerate(zip(made.token_ids[:-1], made.logprobs, strict=False)):
        row = processed(raw[at >= border][len(prompt) - 1 + at], prompt, made.token_ids[:at], params)
        expected = torch.log_softmax(row[digits], dim=-1)
        assert entry[token].logprob == pytest.approx(float(expected[digits.index(token)]), abs=1e-4)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "size": {"type": "integer", "minimum": 0, "maximum": 999},
        "kind": {"enum": ["é", "b"]},
    },
    "required": ["name", "size", "kind"],
    "additionalProperties": False,
}


def is_of_schema(text: str) -> bool:
    found = json.loads(text)
    assert list(found) == ["name", "size", "kind"]
    return len(found["name"]) <= 12 and 0 <= found["size"] <= 999 and found["kind"] in ("é", "b")


FORMS: list[tuple[StructuredOutputs, Callable[[str], Any]]] = [
    (StructuredOutputs(json=SCHEMA), is_of_schema),
    (StructuredOutputs(json=json.dumps(SCHEMA)), is_of_schema),
    (StructuredOutputs(choice=("positive", 'a "quoted" one', "日本")), {"positive", 'a "quoted" one', "日本"}.__contains__),
    (StructuredOutputs(grammar='start: "a" b\nb: "x" | "y" c\nc: "x" | "z"'), re.compile("ax|ay[xz]").fullmatch),
]  # fmt: skip


async def test_forms_hold_for_every_one_of_many(serve: Start, rng: random.Random) -> None:
    """Several forms, and requests without one, in one batch that is so narrow that sequences are computed anew."""
    tokenizer = build_tokenizer()
    no_space = {token: -100.0 for token in range(len(tokenizer)) if tokenizer.decode([token])[:1].isspace()}
    llm, _ = serve(max_num_seqs=8, max_num_batched_tokens=40, max_model_len=400, kv_cache_tokens=500)

    async def ask(form: StructuredOutputs | None) -> RequestOutput:
        # White space is allowed nearly everywhere, and a model of random weights hardly stops with it.
        params = SamplingParams(
            structured_outputs=form, n=3, max_tokens=300, min_tokens=2, seed=rng.getrandbits(30), logit_bias=no_space
        )
        return [each async for each in llm.generate([rng.randrange(256) for _ in range(20)], params)][-1]

    forms = [form for form, _ in FORMS]
    answers = await asyncio.gather(*(ask(form) for form in [*forms, None]))
    for (_, holds), answer in zip(FORMS, answers, strict=False):
        for output in answer.outputs:
            assert output.finish_reason == "stop", output
            assert holds(output.text), output.text
    assert answers[0].outputs[0].text != answers[0].outputs[1].text


async def test_any_json_object(serve: Start) -> None:
    """Biases lead a model of random weights to the ends of texts, lists and objects, which it would hardly find by itself."""
    llm, _ = serve()
    tokenizer = build_tokenizer()
    bias = {token: -100.0 for token in range(len(tokenizer)) if tokenizer.decode([token])[:1].isspace()}
    bias |= {int(tokenizer.convert_tokens_to_ids(mark)): 8.0 for mark in '"]}'}
    form, ended = StructuredOutputs(json_object=True), 0

    async def ask(seed: int) -> RequestOutput:
        params = SamplingParams(structured_outputs=form, max_tokens=250, seed=seed, logit_bias=bias)
        return [each async for each in llm.generate("give me", params)][-1]

    for answer in await asyncio.gather(*map(ask, range(6))):
        output = answer.outputs[0]
        assert output.text.startswith("{")
        if output.finish_reason == "stop":
            ended += 1
            assert isinstance(json.loads(output.text), dict)
    assert ended


@pytest.mark.parametrize(
    "form",
    [
        StructuredOutputs(regex="("),
        StructuredOutputs(json={"type": "nope"}),
        StructuredOutputs(json="{"),
        StructuredOutputs(grammar="start: nowhere"),
    ],
    ids=["regex", "schema", "json", "grammar"],
)
async def test_a_form_without_sense_is_refused(serve: Start, form: StructuredOutputs) -> None:
    llm, _ = serve()
    with pytest.raises(InvalidInput) as caught:
        _ = [each async for each in llm.generate([5], SamplingParams(structured_outputs=form))]
    assert caught.value.field == "structured_outputs"
    assert (await llm.status()).num_running == 0


async def test_a_form_needs_its_library_and_a_tokenizer(serve: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, _ = serve()
    params = SamplingParams(structured_outputs=StructuredOutputs(regex="a"), max_tokens=5)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "llguidance", None)
        with pytest.raises(Unsupported, match=r"pip install 'weightcast\[grammar\]'"):
            _ = [each async for each in llm.generate([5], params)]
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine._grammars, "_tokenizer", None)
        with pytest.raises(Unsupported, match="no fast tokenizer"):
            _ = [each async for each in llm.generate([5], params)]
    assert [each async for each in llm.generate([5], params)][-1].outputs[0].text == "a"


@pytest.mark.parametrize("fields", [{}, {"regex": "a", "json_object": True}, {"choice": ()}, {"regex": 5}])
def test_a_form_is_exactly_one(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="structured_outputs"):
        StructuredOutputs(**fields)
