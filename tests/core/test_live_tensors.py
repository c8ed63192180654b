"""What several workers hold of a tensor, joined to one digest: that of the tensor by itself, or a reason why there is none."""

from __future__ import annotations

import msgspec
import pytest
import torch

from weightcast.content.layout_digest import digest_tensor
from weightcast.content.live_tensors import LiveTensor, TensorDigest, live_tensors, tensor_digests
from weightcast.layout import Placement, Region, contiguous_strides
from weightcast.layout.memory import Memory, bytes_of
from weightcast.manifest import Manifest, TensorSpec

SHAPE = (12, 10)
MANIFEST = Manifest.of(
    [TensorSpec(name="other", dtype="float32", shape=(3,)), TensorSpec(name="w", dtype="float32", shape=SHAPE)]
)


def worker(values: torch.Tensor, *rows: tuple[int, int], dtype: str = "float32") -> dict[str, LiveTensor]:
    """What a worker says that holds these rows of the values, each range in a storage of its own."""
    parts = [values[start:end].clone() for start, end in rows]
    placements = [
        Placement(
            region=Region(name="w", offsets=(start, 0), sizes=(end - start, SHAPE[1])),
            dtype=dtype,
            storage=number,
            offset=0,
            strides=contiguous_strides((end - start, SHAPE[1])),
        )
        for number, (start, end) in enumerate(rows)
    ]
    held = live_tensors(MANIFEST, placements, {}, Memory([bytes_of(part) for part in parts]))
    return msgspec.convert(msgspec.to_builtins(held), dict[str, LiveTensor])


def joined(*workers: dict[str, LiveTensor]) -> TensorDigest:
    (digest,) = tensor_digests(MANIFEST, workers).values()
    return digest


@pytest.mark.parametrize(
    "cuts",
    [
        [[(0, 12)]],
        [[(0, 5)], [(5, 12)]],
        [[(5, 12)], [(0, 5)]],
        [[(0, 12)], [(0, 12)]],
        [[(0, 6)], [(0, 6)], [(6, 12)], [(6, 12)]],
        [[(0, 2), (4, 7)], [(2, 4), (7, 12)]],
    ],
)
def test_slices_and_replicas_prove_the_tensor(cuts: list[list[tuple[int, int]]]) -> None:
    values = torch.randn(SHAPE)
    assert joined(*(worker(values, *rows) for rows in cuts)) == TensorDigest(
        dtype="float32", digest=f"{digest_tensor(values):016x}"
    )
    other = values.clone()
    other[4, 3] += 1
    assert joined(*(worker(other, *rows) for rows in cuts)).digest != f"{digest_tensor(values):016x}"


def test_values_of_another_type_are_digested_in_it() -> None:
    values = torch.randn(SHAPE).bfloat16()
    held = [worker(values, (0, 7), dtype="bfloat16"), worker(values, (7, 12), dtype="bfloat16")]
    assert joined(*held) == TensorDigest(dtype="bfloat16", digest=f"{digest_tensor(values):016x}")
    mixed = joined(worker(values.float(), (0, 7)), held[1])
    assert (mixed.digest, mixed.reason) == ("", "lies here in several types: bfloat16, float32")


def test_what_cannot_be_told_has_a_reason() -> None:
    values, other = torch.randn(SHAPE), torch.randn(SHAPE)
    differ = joined(worker(values, (0, 12)), worker(other, (0, 12)))
    assert (differ.digest, differ.reason) == ("", "lies here more than once, with different values")
    for rows in ([(0, 5)], [(0, 7), (5, 12)]):
        part = joined(*(worker(values, each) for each in rows))
        assert (part.digest, part.reason) == ("", "lies here in part, or in pieces that overlap")
    loader = live_tensors(MANIFEST, [], {"w": "it is quantised"}, Memory([]))
    assert joined(worker(values, (0, 12)), loader) == TensorDigest(reason="it is quantised")
    assert tensor_digests(MANIFEST, []) == {}
    part = {"draft.": LiveTensor(reason="no tensor of it")}
    assert tensor_digests(MANIFEST, [part, part]) == {"draft.": TensorDigest(reason="no tensor of it")}
