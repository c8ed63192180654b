"""The examples with SGLang: the same programs as with the other engines."""

from importlib.util import find_spec

import pytest
from tests.examples.example_runs import learnt, run_example


def test_the_served_example_learns() -> None:
    assert learnt(run_example("rlhf_http.py", "--engine", "sglang", timeout_s=280)) > 0.1


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install ray")
def test_the_example_with_ray_learns() -> None:
    assert learnt(run_example("rlhf.py", "--engine", "sglang", "--engines", "1", timeout_s=280)) > 0.1


def test_rlhf_async_replaces_weights_in_flight() -> None:
    assert "] 4-" in run_example("rlhf_async.py", "--engine", "sglang", timeout_s=280)
