"""Without SGLang (make test-sglang has it) nothing here can run."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
_FOUND = find_spec("sglang")
HAS_SGLANG = _FOUND is not None and _FOUND.origin is not None  # a folder of that name on the path is not SGLang

if HAS_SGLANG:
    from tests.sglang.servers import Launcher


@pytest.fixture(scope="session")
def launcher() -> "Iterator[Launcher]":
    """What forks servers."""
    launcher = Launcher()
    yield launcher
    launcher.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.sglang)
            item.add_marker(pytest.mark.filterwarnings("default"))
            item.add_marker(pytest.mark.timeout(600))


collect_ignore_glob = [] if HAS_SGLANG else ["test_*.py"]
