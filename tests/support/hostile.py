"""Hostile workers: engines of this process that join as others do, and then say what no loader leaves behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import msgspec
import numpy as np

from weightcast.control import ControlLink
from weightcast.layout.table import BOX, PlacementTable
from weightcast.messages import Hello, Landings, Message


@contextmanager
def repeating_landings(engine: str, count: int) -> Iterator[None]:
    """The workers of the engine of this name want one byte's worth of their first tensor ``count`` times."""
    links: set[int] = set()
    send = ControlLink.send

    def say(link: ControlLink, message: Message) -> None:
        if isinstance(message, Hello) and message.engine == engine:
            links.add(id(link))
        if isinstance(message, Landings) and id(link) in links:
            message = _repeating(message, count)
        send(link, message)

    with patch.object(ControlLink, "send", say):
        yield


def _repeating(landings: Landings, count: int) -> Landings:
    table = landings.layout.placements
    numbers = np.repeat(table.numbers()[:, :1], count, axis=1)
    numbers[BOX : BOX + table.dims] = 0
    numbers[BOX + table.dims : BOX + 2 * table.dims] = 1
    layout = msgspec.structs.replace(landings.layout, placements=PlacementTable.packed(numbers, table.dims))
    return msgspec.structs.replace(landings, layout=layout)
