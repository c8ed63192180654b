"""Strided views as boxes, against brute force: values are the tensor's own flat indices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from record_views import SHAPES, random_chain

from weightcast.record.boxes import MAX_BOXES, TooManyBoxes, Walk, boxes_of


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_boxes_hold_each_element_once_and_land_it_right(data):
    shape = data.draw(SHAPES)
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    view = random_chain(data, whole)(whole)
    order = data.draw(st.permutations(range(view.dim())))
    target = torch.full([view.shape[d] for d in order], -1).permute([order.index(d) for d in range(view.dim())])
    walks = [Walk(*walk) for walk in zip(view.shape, view.stride(), target.stride(), strict=True)]
    boxes = boxes_of(shape, view.storage_offset(), walks, 0)
    for box in boxes:
        part = whole[tuple(slice(at, at + n) for at, n in zip(box.offsets, box.sizes, strict=True))]
        target.as_strided(box.sizes, box.target_strides, box.target).copy_(part)
    assert sum(torch.Size(box.sizes).numel() for box in boxes) == view.numel()
    assert torch.equal(target, view)


@pytest.mark.parametrize(
    ("view", "num_boxes"),
    [
        (lambda t: t, 1),
        (lambda t: t.t(), 1),
        (lambda t: t.view(-1), 1),
        (lambda t: t.view(4, 2, 6), 1),
        (lambda t: t[2:7, 1:4].t().unsqueeze(0), 1),
        (lambda t: t.view(-1)[3:41], 3),
        (lambda t: t.view(4, 2, 6).transpose(0, 1), 4),
    ],
)
def test_simple_views_need_few_boxes(view, num_boxes):
    seen = view(torch.arange(48).view(8, 6))
    target = torch.empty(seen.shape)
    walks = [Walk(*walk) for walk in zip(seen.shape, seen.stride(), target.stride(), strict=True)]
    assert len(boxes_of((8, 6), seen.storage_offset(), walks, 0)) == num_boxes


def test_views_of_too_many_boxes_or_repeats_are_refused():
    with pytest.raises(TooManyBoxes, match="more than"):
        boxes_of((4 * MAX_BOXES,), 0, [Walk(2 * MAX_BOXES, 2, 1)], 0)
    with pytest.raises(TooManyBoxes, match="repeats"):
        boxes_of((4, 1), 0, [Walk(4, 1, 3), Walk(3, 0, 1)], 0)
    assert boxes_of((4, 0), 0, [Walk(4, 0, 0), Walk(0, 1, 1)], 0) == []
