"""gloo: the suite, and what only it does."""

from __future__ import annotations

from weightcast.testing.transport_suite import TransportSuite


class TestGloo(TransportSuite):
    transport = "gloo"
