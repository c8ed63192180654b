"""For all tests: suites in weightcast.testing report failed asserts like tests do. It must happen before any test imports them."""

import signal

import pytest

pytest.register_assert_rewrite("weightcast.testing.transport_suite")

# A shell starts what it runs in the background with interrupts ignored, and so would be every process that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
