"""Pausing, aborting, changing weights between steps, versions of tokens, failures of the engine's thread."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from engine_reference import greedy_on, random_prompts

from weightcast.engines.embedded import LLM, SamplingParams
from weightcast.errors import DeadlineExceeded, EngineError, InvalidInput, StateError

_WAIT_S = 30.0


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + _WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture
def running(build: Any, start: Any, rng: random.Random) -> Any:
    """running(num_requests, num_tokens) -> (llm, reference, prompts, future of the outputs), some tokens made."""
    pool = ThreadPoolExecutor(4)

    def run(count: int = 6, num_tokens: int = 60, **arguments: Any) -> Any:
        folder, reference = build("qwen3")
        llm = start(folder, **arguments)
        prompts = random_prompts(rng, count, reference.config.vocab_size)
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        future = pool.submit(llm.generate, prompts, params)
        _until(lambda: llm.status().num_generated_tokens >= 3 * count)
        return llm, reference, prompts, future

    yield run
    pool.shutdown(wait=False, cancel_futures=True)


def _perturb(llm: LLM, reference: Any, seed: int) -> None:
    """Give engine and reference the same new weights, the engine's between two steps."""
    for model in (llm.engine.model, reference):

        def change(model: Any = model) -> None:
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in model.parameters():
                    noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                    parameter.add_(noise * parameter.std() * 0.5)

        if model is reference:
            change()
        else:
            llm.run_between_steps(change)


@pytest.mark.parametrize("how", ["clear", "reset"])
def test_keep_then_new_weights(how: str, running: Any, rng: random.Random) -> None:
    """Frozen requests continue exactly as generate does with the new weights from the tokens made so far."""
    llm, reference, prompts, future = running()
    llm.pause_generation(mode="keep", clear_cache=how == "clear")
    assert llm.is_paused()
    made = llm.status().num_generated_tokens
    _perturb(llm, reference, rng.getrandbits(30))
    llm.update_weight_version("second")
    if how == "reset":
        assert llm.reset_prefix_cache(reset_running_requests=True)
    time.sleep(0.05)
    assert llm.status().num_generated_tokens == made
    assert not future.done()
    llm.resume_generation()
    outputs = future.result(_WAIT_S)
    boundaries = 0
    for prompt, output in zip(prompts, outputs, strict=True):
        each = output.outputs[0]
        assert [span.version for span in each.weight_versions] == ["default", "second"]
        first, second = each.weight_versions
        assert (first.start, first.end, second.end) == (0, second.start, 60)
        boundaries += first.end
        assert each.token_ids[second.start :] == greedy_on(
            reference, prompt + each.token_ids[: first.end], second.end - second.start
        )
    assert boundaries == made


def test_in_flight_change_of_weights(running: Any, rng: random.Random) -> None:
    """Without a pause requests go on, and the versions meet at one step for all of them."""
    llm, reference, _, future = running(num_tokens=120)
    before = llm.run_between_steps(lambda: llm.status().num_generated_tokens)
    _perturb(llm, reference, rng.getrandbits(30))
    llm.update_weight_version("b")
    llm.update_weight_version("c")
    outputs = future.result(_WAIT_S)
    for output in outputs:
        spans = output.outputs[0].weight_versions
        assert spans[0].version == "default"
        assert spans[-1].version == "c"
        assert [span.end for span in spans[:-1]] == [span.start for span in spans[1:]]
        assert (spans[0].start, spans[-1].end) == (0, 120)
    assert sum(output.outputs[0].weight_versions[0].end for output in outputs) >= before


def test_stale_prompts_are_not_shared(build: Any, start: Any, rng: random.Random) -> None:
    """Samples that start after a change of weights do not copy the keys that others computed before it."""
    folder, reference = build("qwen3")
    llm = start(folder, max_num_seqs=2)
    prompt = random_prompts(rng, 2, reference.config.vocab_size)[1]
    with ThreadPoolExecutor(1) as pool:
        params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True, n=4)
        future = pool.submit(llm.generate, [prompt], params)
        _until(lambda: llm.status().num_generated_tokens > 4)
        llm.pause_generation(mode="keep", clear_cache=False)
        assert llm.status().num_waiting == 2
        _perturb(llm, reference, rng.getrandbits(30))
        llm.resume_generation()
        outputs = future.result(_WAIT_S)[0].outputs
    expected = greedy_on(reference, prompt, 50)
    assert [each.token_ids == expected for each in outputs] == [False, False, True, True]


def test_pause_abort(running: Any) -> None:
    llm, reference, prompts, future = running()
    llm.pause_generation(mode="abort")
    outputs = future.result(_WAIT_S)
    assert llm.is_paused()
    for prompt, output in zip(prompts, outputs, strict=True):
        each = output.outputs[0]
        assert output.finished
        assert each.finish_reason == "abort"
        assert each.token_ids == greedy_on(reference, prompt, 60)[: len(each.token_ids)]
        assert each.weight_versions[-1].end == len(each.token_ids) > 0
    llm.pause_generation(mode="abort")
    llm.resume_generation()
    llm.resume_generation()
    assert not llm.is_paused()
    assert len(llm.generate(prompts, SamplingParams(max_tokens=3, ignore_eos=True))) == len(prompts)


def test_pause_wait_drains_and_holds_later_ones(running: Any) -> None:
    llm, _, prompts, future = running(count=5, max_num_seqs=2, num_tokens=30)
    with ThreadPoolExecutor(2) as pool:
        paused = pool.submit(llm.pause_generation, mode="wait")
        _until(lambda: llm.engine.core._draining is not None or paused.done())
        later = pool.submit(llm.generate, prompts[:2], SamplingParams(max_tokens=4, ignore_eos=True))
        outputs = future.result(_WAIT_S)
        paused.result(_WAIT_S)
        assert [each.outputs[0].finish_reason for each in outputs] == ["length"] * 5
        assert llm.is_paused()
        _until(lambda: llm.status().num_waiting == 2)
        assert not later.done()
        llm.resume_generation()
        assert len(later.result(_WAIT_S)) == 2


def test_resume_gives_up_a_waiting_pause(running: Any) -> None:
    llm, _, _, future = running(num_tokens=200)
    waiting: Future[None] = llm.engine.pause("wait", True).result(_WAIT_S)
    llm.resume_generation()
    with pytest.raises(StateError, match="resumed"):
        waiting.result(_WAIT_S)
    assert len(future.result(_WAIT_S)) == 6


def test_abort_some(running: Any) -> None:
    llm, _, _, future = running()
    llm.pause_generation(mode="keep")
    names = list(llm.engine.core.requests)
    assert llm.abort([names[0], "unknown", names[3]]) == 2
    llm.resume_generation()
    reasons = [output.outputs[0].finish_reason for output in future.result(_WAIT_S)]
    assert reasons == ["abort", "length", "length", "abort", "length", "length"]
    assert llm.abort() == 0


def test_pause_mode_is_checked(build: Any, start: Any) -> None:
    llm = start(build("qwen3")[0])
    with pytest.raises(InvalidInput) as caught:
        llm.pause_generation(mode="now")
    assert caught.value.field == "mode"
    assert not llm.is_paused()


def test_an_error_in_a_step_fails_the_running_requests(running: Any) -> None:
    llm, reference, prompts, future = running(count=8, max_num_seqs=4, num_tokens=40)
    word = f"broken {random.random()}"

    def fail(*_: Any) -> None:
        handle.remove()
        raise RuntimeError(word)

    llm.pause_generation(mode="keep", clear_cache=False)
    doomed = {sequence.request.request_id for sequence in llm.engine.core.scheduler.running}
    assert len(doomed) == 4
    handle = llm.engine.model.model.layers[1].register_forward_pre_hook(fail)
    llm.resume_generation()
    with pytest.raises(EngineError, match=word):
        future.result(_WAIT_S)
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.outputs[0].token_ids == greedy_on(reference, prompt, 12)
    assert llm.status().ready


def test_every_failed_request_hears_why_and_the_others_go_on(build: Any, start: Any, rng: random.Random) -> None:
    folder, reference = build("qwen3")
    llm = start(folder, max_num_seqs=2)
    handle = llm.engine.model.model.layers[0].register_forward_pre_hook(_raise_once("no memory"))
    outputs: dict[str, Any] = {}
    prompts = random_prompts(rng, 4, reference.config.vocab_size)
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    requests = [
        llm.engine.request(
            prompt, params, lambda o: outputs.__setitem__(o.request_id, o), request_id=str(i), stream=False
        )
        for i, prompt in enumerate(prompts)
    ]
    llm.engine.submit(requests).result(_WAIT_S)
    _until(lambda: len(outputs) == 4)
    handle.remove()
    assert [outputs[str(i)].outputs[0].finish_reason for i in range(4)] == ["error", "error", "length", "length"]
    assert outputs["0"].error is not None
    assert "no memory" in outputs["0"].error
    assert outputs["3"].outputs[0].token_ids == greedy_on(reference, prompts[3], 5)


def _raise_once(text: str) -> Callable[..., None]:
    calls: list[int] = []

    def hook(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError(text)

    return hook


def test_broken_weights_fail_requests_and_leave_no_trace(running: Any) -> None:
    """NaN weights end the running requests; once the weights are whole again nothing of it is left in the cache."""
    llm, reference, prompts, future = running()
    weight = llm.engine.model.model.layers[0].self_attn.v_proj.weight
    saved = weight.detach().clone()
    llm.run_between_steps(lambda: weight.fill_(float("nan")))
    with pytest.raises(EngineError, match="not finite"):
        future.result(_WAIT_S)
    llm.run_between_steps(lambda: weight.copy_(saved))
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.outputs[0].token_ids == greedy_on(reference, prompt, 8)


def test_commands_run_on_the_engine_thread(build: Any, start: Any) -> None:
    llm = start(build("qwen3")[0])
    name = llm.run_between_steps(lambda: threading.current_thread().name)
    assert name.startswith("weightcast-engine")
    assert name == llm.run_between_steps(lambda: threading.current_thread().name)
    with pytest.raises(ZeroDivisionError):
        llm.run_between_steps(lambda: 1 / 0)
    assert llm.status().ready


def test_bad_prompts_change_nothing(build: Any, start: Any) -> None:
    llm = start(build("qwen3")[0], max_model_len=64)
    for prompt in ([1] * 64, [], [10**6], [-1], [1.5], "", {"text": "x"}, 7):
        with pytest.raises(InvalidInput):
            llm.generate(prompt if not isinstance(prompt, list) else [prompt])
    outputs = llm.generate([[1] * 63], SamplingParams(max_tokens=None, ignore_eos=True))
    assert len(outputs[0].outputs[0].token_ids) == 1
    assert outputs[0].outputs[0].finish_reason == "length"


def test_time_limits(running: Any) -> None:
    llm, _, prompts, future = running(num_tokens=20)
    future.result(_WAIT_S)
    llm.pause_generation(mode="keep")
    with pytest.raises(DeadlineExceeded):
        llm.generate(prompts, SamplingParams(), timeout_s=0.1)
    _until(lambda: llm.status().num_waiting == 0)
    llm.resume_generation()


def test_shutdown(build: Any, start: Any, running: Any) -> None:
    llm, _, _, future = running(num_tokens=2000)
    llm.shutdown()
    llm.shutdown()
    assert {output.outputs[0].finish_reason for output in future.result(_WAIT_S)} == {"abort"}
    assert not llm.status().ready
    with pytest.raises(EngineError, match="gone"):
        llm.generate([[1, 2]])


def test_a_dead_thread_is_reported(running: Any) -> None:
    llm, _, _, future = running(num_tokens=2000)

    def die() -> None:
        raise SystemExit(f"code {llm.max_model_len}")

    llm.engine._thread.call(die)
    with pytest.raises(EngineError, match="SystemExit"):
        future.result(_WAIT_S)
    _until(lambda: not llm.status().ready)
    # Open routes show the reason: it names the error and does not quote what the error says.
    assert llm.status().reason == "the engine is gone: SystemExit"
