"""An application over a scripted engine, called in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
from server_helpers import client_for

from weightcast.testing.scripted_engine import ScriptedEngine


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
async def http(engine: ScriptedEngine) -> AsyncIterator[httpx.AsyncClient]:
    async with client_for(engine) as client:
        yield client
