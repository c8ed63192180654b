"""AsyncLLM: many streams at once, leaving early, the bounded queue, the control calls."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from engine_reference import greedy, greedy_on, random_prompts

from weightcast.engines.base import InferenceEngine
from weightcast.engines.embedded import AsyncLLM, RequestOutput, RequestOutputKind, SamplingParams
from weightcast.engines.embedded.sequence import Request
from weightcast.errors import EngineError, InvalidInput, PromptTooLong, StateError
from weightcast.server import create_app


@pytest.fixture
async def serve(build: Any) -> AsyncIterator[Callable[..., Any]]:
    engines: list[AsyncLLM] = []

    def start(arch: str = "qwen3", **arguments: Any) -> tuple[AsyncLLM, Any]:
        folder, reference = build(arch)
        engines.append(AsyncLLM(folder, num_threads=1, **arguments))
        return engines[-1], reference

    yield start
    for engine in engines:
        await engine.shutdown()


async def _last(llm: InferenceEngine, prompt: Any, params: SamplingParams, name: str | None = None) -> RequestOutput:
    outputs = [output async for output in llm.generate(prompt, params, name)]
    return outputs[-1]


def client_of(llm: InferenceEngine) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=create_app(llm)), base_url="http://localhost:8000")


async def _until(llm: AsyncLLM, condition: Callable[[Any], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition(await llm.status()):
            await asyncio.sleep(0.002)


async def test_streams_are_cumulative_and_greedy(serve: Any, rng: random.Random) -> None:
    llm, reference = serve(max_num_seqs=4)
    prompts = random_prompts(rng, 7, reference.config.vocab_size)

    async def follow(prompt: list[int]) -> list[RequestOutput]:
        return [output async for output in llm.generate(prompt, SamplingParams(temperature=0, max_tokens=15))]

    for prompt, outputs in zip(prompts, await asyncio.gather(*map(follow, prompts)), strict=True):
        expected = greedy(reference, prompt, 15)
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        lengths = [len(output.outputs[0].token_ids) for output in outputs]
        assert lengths == sorted(set(lengths))
        for output in outputs:
            assert output.outputs[0].token_ids == expected[: len(output.outputs[0].token_ids)]
        assert outputs[-1].outputs[0].token_ids == expected


@pytest.mark.parametrize("stream", [False, True])
async def test_outputs_that_nobody_reads_are_not_made(
    stream: bool, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, reference = serve()
    made: list[RequestOutput] = []
    make = Request.output
    monkeypatch.setattr(Request, "output", lambda self: made.append(make(self)) or made[-1])
    async with client_of(llm) as http:
        body = {"prompt": [5, 6, 7], "max_tokens": 20, "ignore_eos": True, "temperature": 0, "return_token_ids": True}
        answer = await http.post("/v1/completions", json={**body, "stream": stream})
    assert answer.status_code == 200
    if stream:
        assert len(made) == 20
    else:
        assert len(made) == 1
        choice = answer.json()["choices"][0]
        assert choice["token_ids"] == greedy_on(reference, [5, 6, 7], 20)
        assert choice["text"] == llm.tokenizer.decode(choice["token_ids"], skip_special_tokens=True)


async def test_only_the_last_output_on_request(serve: Any) -> None:
    llm, reference = serve()
    params = SamplingParams(temperature=0, max_tokens=9, output_kind=RequestOutputKind.FINAL_ONLY)
    outputs = [output async for output in llm.generate([5, 6, 7], params)]
    assert [output.outputs[0].token_ids for output in outputs] == [greedy(reference, [5, 6, 7], 9)]
    generation = llm.generate(
        [5, 6, 7], SamplingParams(max_tokens=1500, ignore_eos=True, output_kind=params.output_kind)
    )
    waiting = asyncio.ensure_future(anext(generation))
    await _until(llm, lambda status: status.num_running == 1)
    assert await llm.abort() == 1
    assert (await waiting).outputs[0].finish_reason == "abort"
    with pytest.raises(InvalidInput, match="output_kind"):
        SamplingParams(output_kind=2)  # type: ignore[arg-type]


async def test_leaving_a_stream_aborts_it(serve: Any) -> None:
    llm, _ = serve()
    stream = llm.generate([1, 2, 3], SamplingParams(max_tokens=1900, ignore_eos=True), "mine")
    await anext(stream)
    assert (await llm.status()).num_running == 1
    await stream.aclose()
    await _until(llm, lambda status: status.num_running == 0)
    for _ in range(10):  # also when an output comes at the same moment
        task = asyncio.create_task(_last(llm, [1, 2], SamplingParams(max_tokens=1900, ignore_eos=True)))
        await _until(llm, lambda status: status.num_running == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await _until(llm, lambda status: status.num_running == 0)


async def test_abort_by_name(serve: Any) -> None:
    llm, _ = serve()
    params = SamplingParams(max_tokens=1900, ignore_eos=True)
    tasks = [asyncio.create_task(_last(llm, [7, i], params, f"r{i}")) for i in range(1, 4)]
    await _until(llm, lambda status: status.num_running == 3)
    assert await llm.abort(["r2", "nobody"]) == 1
    assert (await tasks[1]).outputs[0].finish_reason == "abort"
    with pytest.raises(InvalidInput) as caught:
        await _last(llm, [1], params, "r1")
    assert caught.value.field == "request_id"
    assert await llm.abort() == 2
    assert [output.outputs[0].finish_reason for output in await asyncio.gather(*tasks)] == ["abort"] * 3


async def test_the_queue_is_bounded(serve: Any) -> None:
    llm, _ = serve(max_num_seqs=2, max_waiting=3)
    await llm.pause_generation("keep")
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    tasks = [asyncio.create_task(_last(llm, [7, i], params)) for i in range(8)]
    await _until(llm, lambda status: status.num_waiting == 5)
    done, pending = await asyncio.wait(tasks, timeout=5, return_when=asyncio.FIRST_EXCEPTION)
    done, pending = await asyncio.wait(tasks, timeout=0.2)
    assert (len(done), len(pending)) == (3, 5)
    for task in done:
        with pytest.raises(StateError, match="queue is full"):
            task.result()
    await llm.resume_generation()
    assert all(output.finished for output in await asyncio.gather(*pending))
    assert (await _last(llm, [1, 2], params)).finished


async def test_pause_and_resume(serve: Any) -> None:
    llm, reference = serve()
    params = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
    task = asyncio.create_task(_last(llm, [9, 8, 7], params))
    await _until(llm, lambda status: status.num_generated_tokens > 3)
    await llm.pause_generation("keep", clear_cache=False)
    assert await llm.is_paused()
    status = await llm.status()
    assert (status.paused, status.num_running, status.num_kv_tokens > 3) == (True, 1, True)
    assert await llm.reset_prefix_cache()
    assert (await llm.status()).num_kv_tokens == status.num_kv_tokens
    assert await llm.reset_prefix_cache(reset_running_requests=True)
    assert (await llm.status()).num_kv_tokens == 0
    await llm.resume_generation()
    assert (await task).outputs[0].token_ids == greedy_on(reference, [9, 8, 7], 150)


async def test_giving_up_on_a_waiting_pause(serve: Any) -> None:
    llm, _ = serve()
    task = asyncio.create_task(_last(llm, [1], SamplingParams(max_tokens=300, ignore_eos=True)))
    await _until(llm, lambda status: status.num_running == 1)
    pausing = asyncio.create_task(llm.pause_generation("wait"))
    await asyncio.sleep(0)
    await llm.run_between_steps(lambda: None)  # the engine takes commands in order, so the pause has begun
    pausing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pausing
    assert (await task).outputs[0].finish_reason == "length"
    await _until(llm, lambda status: status.paused)
    await llm.resume_generation()
    assert (await _last(llm, [1], SamplingParams(max_tokens=2))).finished


async def test_a_prompt_without_room_for_an_answer_is_refused(serve: Any) -> None:
    llm, _ = serve(max_model_len=32)
    for prompt, found in (
        ([1] * 32, "32 input tokens"),
        ([1] * 5000, "5000 input tokens"),
        ("ab" * 5000, "10000 characters"),
    ):
        with pytest.raises(PromptTooLong, match=f"maximum context length is 32 tokens.*{found}"):
            await _last(llm, prompt, SamplingParams())
    assert (await llm.status()).ready


async def test_after_shutdown(serve: Any) -> None:
    llm, _ = serve()
    task = asyncio.create_task(_last(llm, [1], SamplingParams(max_tokens=1900, ignore_eos=True)))
    await _until(llm, lambda status: status.num_running == 1)
    await llm.shutdown()
    await llm.shutdown()
    assert (await task).outputs[0].finish_reason == "abort"
    with pytest.raises(EngineError, match="gone"):
        await _last(llm, [1], SamplingParams())
    assert not (await llm.status()).ready
