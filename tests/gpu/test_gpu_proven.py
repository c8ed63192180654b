"""Copy and digest in one pass on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest
from weightcast.plan import Copy
from weightcast.testing.proven_suite import ProvenSuite

pytest.importorskip("triton", reason="needs a CUDA build of torch")


class TestProvenReplay(ProvenSuite):
    device = "cuda"

    def compile(self, copies: Sequence[Copy], src: Memory, dst: Memory, manifest: Manifest) -> Callable[[], int]:
        from weightcast.content.proven_on_gpu import ProvenReplay

        proven = ProvenReplay(copies, src, dst, manifest, torch.device("cuda", 0))
        proven.warm_up()

        def run() -> int:
            assert proven.run() == sum(copy.nbytes for copy in copies)
            torch.cuda.synchronize()
            return proven.total()

        return run
