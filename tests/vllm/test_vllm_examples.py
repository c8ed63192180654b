"""The examples with vLLM: the same programs as with the embedded engine."""

import pytest
from tests.examples.example_runs import learnt, run_example
from tests.vllm.stock import NAMES_VERSIONS


@pytest.mark.parametrize("name", ["rlhf.py", "rlhf_http.py"])
def test_examples_learn(name: str) -> None:
    assert learnt(run_example(name, "--engine", "vllm", timeout_s=240)) > 0.1


@pytest.mark.skipif(not NAMES_VERSIONS, reason="vLLM before 0.32 does not say in its outputs which version made them")
def test_rlhf_async_replaces_weights_in_flight() -> None:
    printed = run_example("rlhf_async.py", "--engine", "vllm", timeout_s=240)
    assert "] 4-" in printed
