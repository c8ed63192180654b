"""Helpers of the server tests."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import chain
from typing import Any

import httpx

from weightcast.server import ServerConfig, create_app
from weightcast.testing.scripted_engine import ScriptedEngine

BASE_URL = "http://localhost:8000"


def client_for(
    engine: ScriptedEngine, config: ServerConfig | None = None, client: str = "127.0.0.1"
) -> httpx.AsyncClient:
    """A client of an application over ``engine`` in this process, calling from the address ``client``."""
    transport = httpx.ASGITransport(app=create_app(engine, config), client=(client, 4711), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url=BASE_URL)


def events_of(text: str) -> list[Any]:
    """The decoded events of a stream that ended as it should."""
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def joined(lists: Iterable[list[Any]]) -> list[Any]:
    """The lists one after the other."""
    return list(chain.from_iterable(lists))
