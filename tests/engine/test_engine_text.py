"""Text of outputs: pieces of characters, stop strings across tokens, stop ids, special tokens."""

from __future__ import annotations

import asyncio
import functools
import random
from typing import Any

import pytest
import torch

from weightcast.engines.embedded import AsyncLLM, SamplingParams
from weightcast.engines.embedded.detokenize import Detokenizer
from weightcast.testing.tokenizer import EOS_ID, build_tokenizer

_TOKENIZER = functools.cache(build_tokenizer)
_TEXT = "naïve 你好 🙂🙃 the end, quïte"


def _decode(ids: list[int]) -> str:
    return _TOKENIZER().decode(ids, skip_special_tokens=True)


def _tokens(text: str) -> list[int]:
    """Every character encoded alone: those outside ASCII become several tokens."""
    tokenizer = _TOKENIZER()
    return [token for character in text for token in tokenizer.encode(character)]


def test_text_grows_by_whole_characters() -> None:
    tokens = _tokens(_TEXT)
    assert len(tokens) > len(_TEXT)
    detokenizer = Detokenizer(_decode, (), (), include_stop=False)
    seen = [""]
    for token in tokens:
        assert detokenizer.add(token) is None
        assert detokenizer.visible.startswith(seen[-1])
        assert "\ufffd" not in detokenizer.visible
        seen.append(detokenizer.visible)
    assert len(set(seen)) > 20
    detokenizer.finish()
    assert detokenizer.visible == _TEXT


def test_an_unfinished_character_comes_at_the_end() -> None:
    tokens = _tokens("ab🙂")[:-1]
    detokenizer = Detokenizer(_decode, (), (), include_stop=False)
    for token in tokens:
        detokenizer.add(token)
    assert detokenizer.visible == "ab"
    detokenizer.finish()
    assert detokenizer.visible == _decode(tokens)
    assert detokenizer.visible.endswith("\ufffd")


def test_broken_bytes_do_not_hold_text_for_ever(rng: random.Random) -> None:
    tokens = [rng.randrange(3, 200) for _ in range(300)]
    detokenizer = Detokenizer(_decode, (), (), include_stop=False)
    for token in tokens:
        detokenizer.add(token)
    assert len(detokenizer.text) > 100
    detokenizer.finish()
    whole = Detokenizer(_decode, (), (), include_stop=False)
    whole.finish(tokens)
    assert whole.text == _decode(tokens)
    assert detokenizer.text.replace("\ufffd", "") == whole.text.replace("\ufffd", "")


def test_the_end_of_a_prompt_is_not_given_out(rng: random.Random) -> None:
    """Also where the prompt stops inside a character, and where the output goes on with broken bytes and nothing else."""
    broken = _tokens("🙂")[0]
    for tail in (_tokens("secret 🙂")[:-2], [broken] * 6, _tokens("secret")):
        detokenizer = Detokenizer(_decode, tail[-6:], (), include_stop=False)
        for token in [*_tokens("the answer"), *[broken] * 3000]:
            detokenizer.add(token)
        assert detokenizer.text.startswith("the answer")
        assert len(detokenizer.text) > 2900


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("stop", ["你好", "🙃 the", "d", "nowhere", "e", "ïte"])
def test_stop_strings_across_tokens(stop: str, include: bool) -> None:
    detokenizer = Detokenizer(_decode, (), ("zzz", stop), include_stop=include)
    shown = ""
    found = None
    for token in _tokens(_TEXT):
        found = detokenizer.add(token)
        assert detokenizer.visible.startswith(shown)
        shown = detokenizer.visible
        if found:
            break
    found = found or detokenizer.finish()
    if stop not in _TEXT:
        assert found is None
        assert detokenizer.visible == _TEXT
        return
    assert found == stop
    before = _TEXT[: _TEXT.index(stop)]
    assert detokenizer.visible == before + (stop if include else "")


def test_stop_string_of_a_model(build: Any, start: Any, rng: random.Random) -> None:
    folder, _ = build("qwen3")
    llm = start(folder)
    params = SamplingParams(seed=rng.getrandbits(30), max_tokens=80, ignore_eos=True)
    whole = llm.generate("start", params)[0].outputs[0]
    cut = next(i for i in range(20, len(whole.text) - 2) if "\ufffd" not in whole.text[i : i + 3])
    stop = whole.text[cut : cut + 3]
    before = whole.text[: whole.text.index(stop)]
    for include in (False, True):
        stopped = llm.generate(
            "start",
            SamplingParams(
                seed=params.seed, max_tokens=80, ignore_eos=True, stop=(stop,), include_stop_str_in_output=include
            ),
        )[0].outputs[0]
        assert stopped.finish_reason == "stop"
        assert stopped.stop_reason == stop
        assert stopped.text == before + (stop if include else "")
        assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)]
        assert len(stopped.token_ids) < len(whole.token_ids)


def test_stop_ids_and_min_tokens(build: Any, start: Any, rng: random.Random) -> None:
    folder, _ = build("qwen3")
    llm = start(folder)
    seed = rng.getrandbits(30)
    whole = llm.generate("x", SamplingParams(seed=seed, max_tokens=30, ignore_eos=True))[0].outputs[0]
    token = whole.token_ids[9]
    first = whole.token_ids.index(token)
    stopped = llm.generate("x", SamplingParams(seed=seed, max_tokens=30, ignore_eos=True, stop_token_ids=(token,)))[
        0
    ].outputs[0]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", token)
    assert stopped.token_ids == whole.token_ids[: first + 1]
    held = llm.generate("x", SamplingParams(seed=seed, max_tokens=30, min_tokens=30, stop_token_ids=(token,)))[
        0
    ].outputs[0]
    assert len(held.token_ids) == 30
    assert token not in held.token_ids[:29]
    assert EOS_ID not in held.token_ids[:29]


def test_end_of_text(build: Any, start: Any) -> None:
    """A model that always says end-of-text ends at once, unless told to ignore it."""
    folder, reference = build("qwen3")
    with torch.no_grad():
        reference.lm_head = torch.nn.Linear(64, reference.config.vocab_size, dtype=torch.float64)
        reference.lm_head.weight.zero_()
        reference.lm_head.bias.copy_(torch.arange(reference.config.vocab_size) == EOS_ID)
    llm = start(reference, tokenizer=str(folder))
    ended = llm.generate("x", SamplingParams(temperature=0, max_tokens=9))[0].outputs[0]
    assert ended.token_ids == [EOS_ID]
    assert (ended.finish_reason, ended.stop_reason, ended.text) == ("stop", None, "")
    ignored = llm.generate("x", SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))[0].outputs[0]
    assert ignored.token_ids == [EOS_ID] * 9
    assert ignored.finish_reason == "length"
    spoken = llm.generate("x", SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, skip_special_tokens=False))[
        0
    ].outputs[0]
    assert spoken.text == 2 * llm.get_tokenizer().decode([EOS_ID])


async def test_streamed_text_only_grows(build: Any, rng: random.Random) -> None:
    folder, _ = build("qwen3")
    llm = AsyncLLM(folder, num_threads=1)
    try:
        params = SamplingParams(seed=rng.getrandbits(30), max_tokens=60, ignore_eos=True, stop=("\x00never",))
        text, count = "", 0
        async for output in llm.generate("hello", params):
            assert output.outputs[0].text.startswith(text)
            text = output.outputs[0].text
            count += 1
            await asyncio.sleep(0)
        assert output.finished
        assert count > 5
        detokenizer = Detokenizer(_decode, output.prompt_token_ids, (), include_stop=False)
        detokenizer.finish(output.outputs[0].token_ids)
        assert text.replace("\ufffd", "") == detokenizer.text.replace("\ufffd", "")
    finally:
        await llm.shutdown()
