"""Bodies that are being read at a time have one budget; small ones are always read."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request

from weightcast.server import body
from weightcast.server.body import read_body
from weightcast.server.replies import RequestRefused

LIMIT = 10_000


class Client:
    """Sends a body in parts, each when it is told to."""

    def __init__(self, app: Starlette) -> None:
        self._parts: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        scope = {"type": "http", "app": app, "headers": [], "method": "POST", "path": "/"}
        self.reading = asyncio.create_task(read_body(Request(scope, self._parts.get), LIMIT))

    async def send(self, data: bytes, more: bool = True) -> None:
        await self._parts.put({"type": "http.request", "body": data, "more_body": more})
        await asyncio.sleep(0.01)


async def test_large_bodies_share_a_budget_and_small_ones_are_always_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "SMALL_BODY_NBYTES", 100)
    monkeypatch.setattr(body, "ALL_BODIES_NBYTES", 5000)
    app = Starlette()
    slow = Client(app)
    await slow.send(b"s" * 4000)
    refused, small = Client(app), Client(app)
    await refused.send(b"r" * 2000)
    with pytest.raises(RequestRefused) as caught:
        await refused.reading
    assert caught.value.status == 503
    await small.send(b"x" * 100, more=False)
    assert await small.reading == b"x" * 100
    await slow.send(b"t", more=False)
    assert await slow.reading == b"s" * 4000 + b"t"
    again = Client(app)
    await again.send(b"a" * 5000, more=False)
    assert await again.reading == b"a" * 5000


async def test_a_client_that_goes_away_gives_its_share_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "SMALL_BODY_NBYTES", 100)
    monkeypatch.setattr(body, "ALL_BODIES_NBYTES", 5000)
    app = Starlette()
    gone = Client(app)
    await gone.send(b"g" * 4000)
    gone.reading.cancel()
    await asyncio.gather(gone.reading, return_exceptions=True)
    next_one = Client(app)
    await next_one.send(b"n" * 5000, more=False)
    assert await next_one.reading == b"n" * 5000
