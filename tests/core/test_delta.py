"""Changes of an image: found, written and read back bit for bit, whatever the values; whatever the bytes, reading ends well or by name."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from weightcast.delta import Form, Kind, Stretch, decode, encode, find
from weightcast.delta.form import UNSIGNED, Bytes
from weightcast.errors import ProtocolError

KINDS = [Kind(size, is_absolute) for size in (1, 2, 4, 8) for is_absolute in (False, True)]


@st.composite
def forms(draw: st.DrawFn) -> Form:
    """Stretches of all kinds at multiples of 256, with gaps between them."""
    stretches, end = [], 0
    for kind in draw(st.lists(st.sampled_from(KINDS), max_size=6)):
        nbytes = draw(st.integers(1, 700)) * kind.itemsize
        stretches.append(Stretch(-(-end // 256) * 256, nbytes, kind))
        end = stretches[-1].offset + nbytes
    return Form(stretches, end)


def values_of(form: Form, image: Bytes) -> list[Bytes]:
    return [image[s.offset : s.offset + s.nbytes].copy() for s in form.stretches]


def applied(form: Form, old: Bytes, data: bytes) -> Bytes:
    """An image as it is after some changes, by one element after the other."""
    image = old.copy()
    for kind, positions, values in decode(form, data):
        bits = UNSIGNED[kind.itemsize]
        elements = image[: len(image) // kind.itemsize * kind.itemsize].view(bits)
        for position, value in zip(positions.tolist(), values.tolist(), strict=True):
            before = 0 if kind.is_absolute else int(elements[position])
            elements[position] = (before + value) % 2 ** (8 * kind.itemsize)
    return image


@given(form=forms(), seed=st.integers(0, 2**32 - 1), share=st.sampled_from([0.0, 0.001, 0.02, 0.3, 1.0]))
@settings(max_examples=200, deadline=None)
def test_what_is_read_is_what_was_found(form: Form, seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    old = rng.integers(0, 256, form.nbytes, np.uint8)
    new = old.copy()
    for stretch in form.stretches:
        elements = new[stretch.offset : stretch.offset + stretch.nbytes].view(UNSIGNED[stretch.kind.itemsize])
        where = np.flatnonzero(rng.random(len(elements)) < share)
        small = rng.integers(-3, 4, len(where)).astype(np.int64).astype(elements.dtype)
        any_bits = rng.integers(0, 2**63, len(where), np.uint64).astype(elements.dtype)
        elements[where] += np.where(rng.random(len(where)) < 0.9, small, any_bits)
    found = find(form, old, values_of(form, new))
    data = encode(form, found)
    if data is None:
        assert share >= 0.3 or form.nbytes < 2000
        return
    assert len(data) < form.nbytes
    result = applied(form, old, data)
    assert [v.tobytes() for v in values_of(form, result)] == [v.tobytes() for v in values_of(form, new)]
    assert sum(len(one.positions) for one in found) == sum(
        int(np.count_nonzero(was.view(UNSIGNED[s.kind.itemsize]) != now.view(UNSIGNED[s.kind.itemsize])))
        for s, was, now in zip(form.stretches, values_of(form, old), values_of(form, new), strict=True)
    )


def test_a_step_of_bfloat16_weights_takes_at_most_eleven_bits_a_changed_element() -> None:
    rng = np.random.default_rng()
    numel = 2**20
    form = Form([Stretch(0, 2 * numel, Kind(2, False))], 2 * numel)
    weights = (rng.standard_normal(numel) * 0.02).astype(np.float32)
    moved = weights + (rng.standard_normal(numel) * 2e-6).astype(np.float32)
    old, new = ((values.view(np.uint32) + 0x8000 >> 16).astype(np.uint16).view(np.uint8) for values in (weights, moved))
    found = find(form, old, [new])
    count = sum(len(one.positions) for one in found)
    data = encode(form, found)
    assert data is not None
    assert 0.005 < count / numel < 0.1
    assert len(data) * 8 <= 11 * count


FORM = Form([Stretch(0, 4000, Kind(2, False)), Stretch(4096, 4000, Kind(4, True))], 8096)


def frame(body: bytes, *heads: tuple[int, int, int]) -> bytes:
    return b"".join(struct.pack("<III", *head) for head in heads) + zstandard.ZstdCompressor().compress(body)


NONE = (0, 0, 0)
WHOLE = 2**32 - 1
BOMB = zstandard.ZstdCompressor(level=19).compress(bytes(2**28))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(bytes(24), id="no frame"),
        pytest.param(frame(b"", NONE), id="one head"),
        pytest.param(frame(b"\0\0", (1, 0, 0), NONE)[:-1], id="cut off"),
        pytest.param(frame(b"\0\0", (1, 0, 0), NONE) + b"x", id="more behind it"),
        pytest.param(frame(b"\0\0\0", (1, 0, 0), NONE), id="longer than it says"),
        pytest.param(frame(b"\xff\x01", (1, 0, 0), NONE), id="an escape without its number"),
        pytest.param(frame(b"\0\0\0\0\0\0", (1, 1, 0), NONE), id="a number without its escape"),
        pytest.param(frame(b"\0\x01", (1, 0, 2), NONE), id="more wide values than values"),
        pytest.param(frame(b"", (2001, 0, 0), NONE), id="more changes than values"),
        pytest.param(frame(b"", (0, 0, WHOLE - 1), NONE), id="wide values of nothing"),
        pytest.param(frame(b"\xff\x01\xd0\x07\0\0", (1, 1, 0), NONE), id="behind the last value"),
        pytest.param(frame(b"\xff\x01\xff\xff\xff\xff", (1, 1, 0), NONE), id="far behind"),
        pytest.param(frame(b"\0\0\0\0\0", NONE, (1, 0, WHOLE)), id="before the first value of its kind"),
        pytest.param(frame(b"\xff\0\x04\0\0\x01", NONE, (1, 1, 0)), id="a difference of an absolute value"),
        pytest.param(bytes(24) + BOMB, id="a bomb that says so"),
        pytest.param(struct.pack("<III", 2000, 2000, 2000) + bytes(12) + BOMB, id="a bomb in many values"),
    ],
)
def test_what_encode_cannot_have_written_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="malformed changes"):
        decode(FORM, data)


@given(data=st.binary(max_size=300), heads=st.lists(st.integers(0, 2**32 - 1), min_size=6, max_size=6))
@settings(deadline=None)
def test_any_bytes_are_changes_inside_of_the_values_or_refused(data: bytes, heads: list[int]) -> None:
    small = [head % 300 if head % 7 else head for head in heads]
    for given_bytes in (data, frame(data, tuple(small[:3]), tuple(small[3:]))):  # type: ignore[arg-type]
        try:
            several = decode(FORM, given_bytes)
        except ProtocolError:
            continue
        for kind, positions, values in several:
            assert len(values) == len(positions) <= FORM.numel[kind]
            assert (np.diff(positions) > 0).all()
            assert all(FORM.starts[kind][0] <= p < FORM.ends[kind][0] for p in positions)
