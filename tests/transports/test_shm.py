"""shm: the suite, and what only it does."""

from __future__ import annotations

from weightcast.testing.transport_suite import TransportSuite


class TestShm(TransportSuite):
    transport = "shm"
    bucket_sizes = (2**20,)
