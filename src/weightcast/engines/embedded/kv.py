"""Keys and values of running sequences.

Sequences of similar length share a shelf: one tensor of rows per layer, every row with room for ``room`` tokens. The
rows in use are always the first ones, so a decode step reads them as one view, without a copy. A sequence that
outgrows its row moves to the next shelf, which has rows twice as long. Shapes come from the first keys and values a
layer shows. Unused places hold zeros, never garbage: masked attention still multiplies them.
"""

from __future__ import annotations

from typing import Protocol

import torch

_SMALLEST_ROOM = 64
_FIRST_ROWS = 4


class Occupant(Protocol):
    """What the cache knows of a sequence: where the sequence's keys and values lie, and for how many tokens there are some."""

    shelf: Shelf | None
    row: int
    num_computed: int


class Shelf:
    """Rows of one length. ``owners[row]`` is the sequence in a row; layers appear when they are first written."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.num_rows = 0
        self.owners: list[Occupant] = []
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The (rows, heads, room, head size) tensors of a layer, made like ``key`` and ``value`` if new."""
        pair = self.layers.get(index)
        if pair is None:
            pair = (self._zeros(key), self._zeros(value))
            self.layers[index] = pair
        return pair

    def resize(self, num_rows: int) -> None:
        """Change the number of rows, keeping those in use."""
        used = len(self.owners)
        for index, pair in self.layers.items():
            self.layers[index] = (_resized(pair[0], used, num_rows), _resized(pair[1], used, num_rows))
        self.num_rows = num_rows
        if num_rows == 0:
            self.layers.clear()

    def clear_row(self, row: int) -> None:
        for pair in self.layers.values():
            pair[0][row].zero_()
            pair[1][row].zero_()

    def copy_row(self, row: int, source: Shelf, source_row: int, num_tokens: int) -> None:
        """Copy the first tokens of another row, of this or another shelf."""
        for index, pair in source.layers.items():
            mine = self.layer(index, pair[0][0], pair[1][0])
            mine[0][row, :, :num_tokens].copy_(pair[0][source_row, :, :num_tokens])
            mine[1][row, :, :num_tokens].copy_(pair[1][source_row, :, :num_tokens])

    def _zeros(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_zeros(self.num_rows, like.shape[0], self.room, like.shape[-1])


class KvCache:
    """All shelves, and which sequence has which row. ``capacity`` bounds the tokens that are allocated; nothing is allocated before it
    is used."""

    def __init__(self, capacity_tokens: int, max_model_len: int, max_rows: int) -> None:
        self.capacity_tokens = capacity_tokens
        self.max_rows = max_rows
        self.shelves: list[Shelf] = []
        room = _SMALLEST_ROOM
        while room < max_model_len:
            self.shelves.append(Shelf(room))
            room *= 2
        self.shelves.append(Shelf(max_model_len))

    @property
    def allocated_tokens(self) -> int:
        return sum(shelf.num_rows * shelf.room for shelf in self.shelves)

    def place(self, sequence: Occupant, num_tokens: int) -> bool:
        """Give a sequence a cleared row for ``num_tokens``. Returns False, and changes nothing, when there is no room."""
        shelf = self._shelf_for(num_tokens)
        if not self._make_row(shelf):
            return False
        self._sit(sequence, shelf)
        return True

    def extend(self, sequence: Occupant, num_tokens: int) -> bool:
        """Let a placed sequence grow to ``num_tokens``, and move the sequence to a longer row if needed. Returns False when there is no
        room."""
        old = sequence.shelf
        assert old is not None
        if num_tokens <= old.room:
            return True
        shelf = self._shelf_for(num_tokens)
        if not self._make_row(shelf):
            return False
        old_row = sequence.row
        self._sit(sequence, shelf)
        shelf.copy_row(sequence.row, old, old_row, sequence.num_computed)
        self._leave(old, old_row)
        return True

    def fork(self, sequence: Occupant, source: Occupant, num_tokens: int) -> None:
        """Copy keys and values of the first tokens from another sequence. Both sequences are placed."""
        assert sequence.shelf is not None
        assert source.shelf is not None
        sequence.shelf.copy_row(sequence.row, source.shelf, source.row, num_tokens)

    def release(self, sequence: Occupant) -> None:
        """Free the sequence's row; the last row of the shelf moves into the gap."""
        shelf, row = sequence.shelf, sequence.row
        if shelf is None:
            return
        sequence.shelf = None
        self._leave(shelf, row)

    def trim(self) -> None:
        """Give back the memory of rows that nobody uses."""
        for shelf in self.shelves:
            if shelf.num_rows > len(shelf.owners):
                shelf.resize(len(shelf.owners))

    def _shelf_for(self, num_tokens: int) -> Shelf:
        for shelf in self.shelves:
            if shelf.room >= num_tokens:
                return shelf
        raise AssertionError(f"{num_tokens} tokens are more than max_model_len")

    def _make_row(self, shelf: Shelf) -> bool:
        used = len(shelf.owners)
        if used < shelf.num_rows:
            return True
        possible = (self.capacity_tokens - self.allocated_tokens) // shelf.room
        if possible < 1:
            self.trim()
            possible = (self.capacity_tokens - self.allocated_tokens) // shelf.room
        wanted = min(max(_FIRST_ROWS, used), self.max_rows - used, possible)
        if wanted < 1:
            return False
        shelf.resize(used + wanted)
        return True

    @staticmethod
    def _sit(sequence: Occupant, shelf: Shelf) -> None:
        sequence.shelf, sequence.row = shelf, len(shelf.owners)
        shelf.owners.append(sequence)
        shelf.clear_row(sequence.row)

    @staticmethod
    def _leave(shelf: Shelf, row: int) -> None:
        last = shelf.owners.pop()
        if row < len(shelf.owners):
            shelf.copy_row(row, shelf, len(shelf.owners), shelf.room)
            shelf.owners[row], last.row = last, row


def _resized(tensor: torch.Tensor, used: int, num_rows: int) -> torch.Tensor:
    fresh = tensor.new_zeros(num_rows, *tensor.shape[1:])
    fresh[:used].copy_(tensor[:used])
    return fresh
