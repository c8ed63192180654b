"""Without vLLM (make test-vllm has it) nothing here can run."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
_FOUND = find_spec("vllm")
HAS_VLLM = _FOUND is not None and _FOUND.origin is not None  # a folder of that name on the path is not vLLM

if HAS_VLLM:
    from tests.vllm.offline import FreshLoads


@pytest.fixture(scope="session")
def fresh() -> "Iterator[FreshLoads]":
    """What vLLM answers when it loads weights from disk."""
    loads = FreshLoads()
    yield loads
    loads.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.filterwarnings("default"))
            item.add_marker(pytest.mark.timeout(300))


collect_ignore_glob = [] if HAS_VLLM else ["test_*.py"]
