"""Hostile workers: engines of this process that join as others do, and then say what no loader leaves behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import msgspec

from weightcast.control import ControlLink
from weightcast.layout import Region
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
    first = landings.layout.placements[0]
    sizes = tuple(1 for _ in first.region.sizes)
    region = Region(name=first.region.name, offsets=tuple(0 for _ in sizes), sizes=sizes)
    placement = msgspec.structs.replace(first, region=region)
    layout = msgspec.structs.replace(landings.layout, placements=(placement,) * count)
    return msgspec.structs.replace(landings, layout=layout)
