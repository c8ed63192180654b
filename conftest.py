"""For all tests: suites in weightcast.testing report failed asserts like tests do. It must happen before any test imports them."""

import gc
import signal

import pytest

from weightcast.testing import ranks

pytest.register_assert_rewrite("weightcast.testing.transport_suite")

# A shell starts what it runs in the background with interrupts ignored, and so would be every process that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Many ranks shard, load and publish real modules; each would import these again, which takes longer than most of the tests.
ranks.PRELOAD += [
    "tests.support.engine_process", "tests.support.trainer_process", "torch.distributed.fsdp", "transformers.modeling_utils",
    "weightcast.engines.embedded",
]  # fmt: skip


def pytest_collection_finish() -> None:
    """What all those modules made stays; tests that look for garbage need not look there."""
    gc.collect()
    gc.freeze()
