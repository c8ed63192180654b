"""The conformance suite of transports with both sides in processes of their own that use the GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from gpu_sides import GpuTrainerSide, GpuWorkerSide

from weightcast.testing.ranks import Peer
from weightcast.testing.transport_suite import TransportSuite


class GpuSidesSuite(TransportSuite):
    bucket_sizes = (8192, 2**20)

    @pytest.fixture(scope="class")
    @classmethod
    def shared_worker(cls) -> Iterator[Peer]:
        with Peer(GpuWorkerSide) as peer:
            yield peer

    @pytest.fixture
    def worker(self) -> Iterator[Peer]:
        with Peer(GpuWorkerSide) as peer:
            yield peer

    @pytest.fixture
    def trainer(self) -> Iterator[Peer]:
        with Peer(GpuTrainerSide, rank=0) as peer:
            yield peer
