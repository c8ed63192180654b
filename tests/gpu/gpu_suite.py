"""The conformance suite of transports with both sides in processes of their own that use the GPU."""

from __future__ import annotations

from gpu_sides import GpuTrainerSide, GpuWorkerSide

from weightcast.testing.transport_suite import TransportSuite


class GpuSidesSuite(TransportSuite):
    bucket_sizes = (8192, 2**20)
    worker_side = GpuWorkerSide
    trainer_side = GpuTrainerSide
