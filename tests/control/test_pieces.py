"""Pieces: any frame comes whole out of its pieces, and what is no frame ends in a named error."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightcast.control.pieces import MESSAGE_NBYTES, PIECE_NBYTES, Joiner, TooLong, cut
from weightcast.errors import ProtocolError

LIMIT = 8 * PIECE_NBYTES


@pytest.mark.parametrize("nbytes", [0, 1, PIECE_NBYTES - 1, PIECE_NBYTES, PIECE_NBYTES + 1, 3 * PIECE_NBYTES, LIMIT])
def test_a_frame_comes_whole_and_each_piece_fits_a_message(nbytes: int) -> None:
    joiner = Joiner()
    for _ in range(2):
        frame = os.urandom(nbytes)
        pieces = list(cut(frame))
        assert all(len(piece) < MESSAGE_NBYTES for piece in pieces)
        assert [joiner.add(piece, LIMIT) for piece in pieces] == [None] * (len(pieces) - 1) + [frame]


def test_a_frame_that_is_too_long_is_refused_by_its_first_piece() -> None:
    first = next(cut(bytes(LIMIT + 1)))
    with pytest.raises(TooLong, match=f"{LIMIT + 1} bytes where at most {LIMIT}"):
        Joiner().add(first, LIMIT)
    with pytest.raises(TooLong):
        Joiner().add(b"\x00" + bytes(11), 10)


@given(st.lists(st.binary(max_size=40), max_size=6))
@settings(max_examples=300, deadline=None)
def test_whatever_comes_is_a_frame_or_a_protocol_error_and_the_next_frame_is_heard(pieces: list[bytes]) -> None:
    joiner, is_open = Joiner(), False
    for piece in pieces:
        try:
            is_open = joiner.add(piece, LIMIT) is None
        except ProtocolError:
            is_open = False
    if not is_open:
        assert joiner.add(b"\x00hello", LIMIT) == b"hello"


def test_pieces_that_do_not_add_up_to_the_length_are_a_protocol_error() -> None:
    first, second, last = cut(os.urandom(2 * PIECE_NBYTES + 5))
    for pieces in ([first, last], [first, second, last + b"x"], [first, second, b"\x01" + last[1:]], [first, b"\x01"]):
        joiner = Joiner()
        *some, wrong = pieces
        assert [joiner.add(piece, LIMIT) for piece in some] == [None] * len(some)
        with pytest.raises(ProtocolError, match="not as long as it is"):
            joiner.add(wrong, LIMIT)
