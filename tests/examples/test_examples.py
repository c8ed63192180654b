"""The examples with the embedded engine: they train, publish, and check what they say."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.examples.example_runs import EXAMPLES, learnt, run_example
from tests.support.warm import Warm, obstacle

pytestmark = pytest.mark.timeout(300)
LONG_S = 250.0
"""Of a busy machine; in an idle one an example takes less than ten seconds."""


@pytest.fixture
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., str]:
    """Runs an example without the seconds of importing, where this system lets us."""
    if obstacle():
        return run_example
    warm: Warm = request.getfixturevalue("warm")

    def run_warm(name: str, timeout_s: float) -> str:
        return warm.run("python", str(EXAMPLES / name), folder=tmp_path, timeout_s=timeout_s)

    return run_warm


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'weightcast[ray]'")
def test_rlhf_with_ray() -> None:
    assert learnt(run_example("rlhf.py", timeout_s=LONG_S)) > 0.1


def test_rlhf_async_replaces_weights_in_flight(run: Callable[..., str]) -> None:
    printed = run("rlhf_async.py", timeout_s=LONG_S)
    assert "] 4-" in printed
    assert "] default, [" in printed


def test_streams_of_merged_adapters(run: Callable[..., str]) -> None:
    assert learnt(run("streams.py", timeout_s=LONG_S)) > 0.1


def test_a_trainer_with_a_form_of_its_own(run: Callable[..., str]) -> None:
    assert learnt(run("exported.py", timeout_s=LONG_S)) > 0.1


def test_rlhf_http(run: Callable[..., str]) -> None:
    assert learnt(run("rlhf_http.py", timeout_s=LONG_S)) > 0.1


@pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed: pip install 'weightcast[trl]'")
def test_trl_grpo(run: Callable[..., str]) -> None:
    assert learnt(run("trl_grpo.py", timeout_s=LONG_S)) > 0.05
