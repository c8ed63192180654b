"""For all tests: suites in weightcast.testing report failed asserts like tests do. It must happen before any test imports them."""

import pytest

pytest.register_assert_rewrite("weightcast.testing.transport_suite")
