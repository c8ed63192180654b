"""Values that are NaN or infinite are counted on a GPU as on a CPU, in types that torch computes with and in those it does not."""

from __future__ import annotations

import pytest
import torch

from weightcast.content.finite import non_finite
from weightcast.layout import Region, contiguous_strides
from weightcast.layout.memory import Memory
from weightcast.manifest.dtypes import name_of
from weightcast.plan import Copy

pytestmark = pytest.mark.gpu


def test_counts_on_a_gpu_are_those_on_a_cpu() -> None:
    tensors = [
        torch.randn(257, 33).to(dtype)
        for dtype in (
            torch.bfloat16,
            torch.float16,
            torch.float32,
            torch.float64,
            torch.float8_e4m3fn,
            torch.float8_e5m2,
        )
    ]
    for number, tensor in enumerate(tensors):
        rows = torch.randperm(257)[: number + 1]
        tensor[rows, 5] = torch.tensor(float("nan")).to(tensor.dtype)
    tensors.append(torch.randn(64, 64).to(torch.bfloat16))  # has none
    copies = [
        Copy(
            region=Region(name=f"t{number}", offsets=(0, 0), sizes=tuple(tensor.shape)),
            src_storage=number,
            src_dtype=name_of(tensor.dtype),
            src_offset=0,
            dst_storage=0,
            dst_dtype=name_of(tensor.dtype),
            dst_offset=0,
            src_strides=contiguous_strides(tensor.shape),
            dst_strides=contiguous_strides(tensor.shape),
        )
        for number, tensor in enumerate(tensors)
    ]
    found = [
        non_finite(copies, Memory([tensor.to(device).view(torch.uint8).flatten() for tensor in tensors]))
        for device in ("cpu", "cuda")
    ]
    assert found[0] == found[1] == {f"t{number}": number + 1 for number in range(6)}
