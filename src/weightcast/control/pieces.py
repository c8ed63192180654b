"""Pieces: frames cut for the wire, so that no peer can have this process take more memory than it is expected to need. Pure.

ZeroMQ reads a whole message before anybody sees it, that of a peer without a key included, so its limit is set to one piece. A longer
frame travels as several messages: the first says how long the frame is, and one that is too long is refused there.

    piece   1 byte (1: more of the frame follow, 0: the last), then for a first piece of several 8 bytes (length of the frame,
            big-endian unsigned), then bytes of the frame
"""

from __future__ import annotations

from collections.abc import Iterator

from weightcast.errors import ProtocolError

PIECE_NBYTES = 2**18
"""Bytes of a frame in one piece."""
MESSAGE_NBYTES = PIECE_NBYTES + 1024
"""The largest message: a piece, what stands before it and what encryption adds."""
_LENGTH_NBYTES = 8
_LAST, _MORE = b"\x00", b"\x01"


def cut(frame: bytes) -> Iterator[bytes]:
    """The pieces of a frame."""
    if len(frame) <= PIECE_NBYTES:
        yield _LAST + frame
        return
    view = memoryview(frame)
    for start in range(0, len(frame), PIECE_NBYTES):
        length = len(frame).to_bytes(_LENGTH_NBYTES, "big") if start == 0 else b""
        more = _MORE if start + PIECE_NBYTES < len(frame) else _LAST
        yield more + length + bytes(view[start : start + PIECE_NBYTES])


class TooLong(ProtocolError):
    """A frame is longer than the receiver takes; what follows of it cannot be understood any more."""


class Joiner:
    """Puts one peer's pieces together again."""

    def __init__(self) -> None:
        self._frame = (
            bytearray()
        )  # not the pieces: a million of them, of a byte each, take fifty times the memory of the frame
        self._missing = 0

    def add(self, piece: bytes, limit_nbytes: int) -> bytes | None:
        """The frame that ends with this piece; None while more of it follow.

        Raises TooLong for a frame of more than ``limit_nbytes``, and ProtocolError for a piece that is none, which ends the frame that
        it came in.
        """
        try:
            return self._add(piece, limit_nbytes)
        except ProtocolError:
            self._frame = bytearray()
            raise

    def _add(self, piece: bytes, limit_nbytes: int) -> bytes | None:
        mark, body = piece[:1], piece[1:]
        if mark not in (_LAST, _MORE):
            raise ProtocolError("not a piece of a frame")
        if not self._frame:
            if mark == _LAST:
                if len(body) > limit_nbytes:
                    raise TooLong(f"a frame of {len(body)} bytes where at most {limit_nbytes} are due")
                return body
            self._missing, body = int.from_bytes(body[:_LENGTH_NBYTES], "big"), body[_LENGTH_NBYTES:]
            if self._missing > limit_nbytes:
                raise TooLong(f"a frame of {self._missing} bytes where at most {limit_nbytes} are due")
        self._frame += body
        self._missing -= len(body)
        if self._missing < 0 or not body or (mark == _LAST) != (self._missing == 0):
            raise ProtocolError("the pieces of a frame are not as long as it is")
        if mark == _MORE:
            return None
        frame, self._frame = bytes(self._frame), bytearray()
        return frame
