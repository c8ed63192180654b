"""The examples with the embedded engine: they train, publish, and check what they say."""

from importlib.util import find_spec

import pytest
from tests.examples.example_runs import learnt, run_example


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'weightcast[ray]'")
def test_rlhf_with_ray() -> None:
    assert learnt(run_example("rlhf.py", timeout_s=110)) > 0.1


def test_rlhf_async_replaces_weights_in_flight() -> None:
    printed = run_example("rlhf_async.py", timeout_s=90)
    assert "] 4-" in printed
    assert "] default, [" in printed


def test_streams_of_merged_adapters() -> None:
    assert learnt(run_example("streams.py", timeout_s=90)) > 0.1


def test_rlhf_http() -> None:
    assert learnt(run_example("rlhf_http.py", timeout_s=90)) > 0.1


@pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed: pip install 'weightcast[trl]'")
def test_trl_grpo() -> None:
    assert learnt(run_example("trl_grpo.py", timeout_s=110)) > 0.05
