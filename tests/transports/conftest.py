import pytest

pytest.register_assert_rewrite("weightcast.testing.transport_suite")
