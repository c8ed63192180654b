"""For all tests: suites in weightcast.testing report failed asserts like tests do. It must happen before any test imports them."""

import gc
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from tests.support.warm import Warm, obstacle

from weightcast.testing import ranks

pytest.register_assert_rewrite(
    "weightcast.testing.transport_suite", "weightcast.testing.transport_pairs", "weightcast.testing.engine_suite"
)

# A shell starts what it runs in the background with interrupts ignored, and so would be every process that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Many ranks shard, load and publish real modules; each would import these again, which takes longer than most of the tests.
ranks.PRELOAD += [
    "tests.support.engine_process", "tests.support.trainer_process", "torch.distributed.fsdp", "transformers.modeling_utils",
    "weightcast.engines.embedded", "weightcast.transports.tls",
]  # fmt: skip

WARMED = (
    "tests/documents/test_readme.py",
    "tests/documents/test_tutorial.py",
    "tests/documents/test_deployment.py",
    "tests/examples/test_examples.py",
)
"""Files that use the fixture ``warm``: they are played one after the other by one worker of xdist, with one warm process."""

FIRST = [
    *WARMED, "tests/faults/test_matrix.py", "tests/demo/test_demo_commands.py", "tests/faults/test_soak.py",
    "tests/sync/test_published_values.py", "tests/server/test_serve_command.py", "tests/sync/test_several_ranks.py",
    "tests/vllm/test_parallel.py", "tests/vllm/test_experts.py", "tests/vllm/test_beside_stock.py", "tests/vllm/test_vllm_suite.py",
    "tests/vllm/test_served.py", "tests/vllm/test_models.py",
]  # fmt: skip
"""The files that take longest. Where several files run at once, what starts last decides when all have ended."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from tests.support.schedule import Together  # not every environment has xdist

    return Together(config, log, WARMED) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {file: number for number, file in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(FIRST)))


def pytest_collection_finish() -> None:
    """What all those modules made stays; tests that look for garbage need not look there."""
    _look_no_more_at_what_is_there()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Nor at what a file's tests imported: a census takes half a second after an hour of others' modules and reports."""
    if nextitem is not None and nextitem.path != item.path:
        _look_no_more_at_what_is_there()


def _look_no_more_at_what_is_there() -> None:
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """A process whose forks are commands of Python without the seconds of importing. CI plays every test: there it has to work."""
    if why := obstacle():
        (pytest.fail if "CI" in os.environ else pytest.skip)(why)
    with Warm(tmp_path_factory.mktemp("warm")) as process:
        yield process
