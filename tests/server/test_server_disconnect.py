"""A client that leaves: its request ends in the engine, whatever it was waiting for. Over a real socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import uvicorn

from weightcast.server import create_app
from weightcast.server.run import bind
from weightcast.testing.scripted_engine import ScriptedEngine


@asynccontextmanager
async def served(engine: ScriptedEngine) -> AsyncIterator[int]:
    sock = bind("127.0.0.1", 0)
    config = uvicorn.Config(create_app(engine), log_config=None, timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve([sock]))
    try:
        await until(lambda: server.started)
        yield sock.getsockname()[1]
    finally:
        server.should_exit = True
        await asyncio.wait_for(task, 10)


async def open_request(port: int, **body: object) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps({"prompt": ["a", "b"], "max_tokens": 2000, **body}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    await writer.drain()
    return reader, writer


async def until(condition: object, timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("paused", [False, True])
async def test_leaving_aborts(stream: bool, paused: bool) -> None:
    engine = ScriptedEngine(token_delay_s=0.005)
    if paused:
        await engine.pause_generation("keep")
    async with served(engine) as port:
        reader, writer = await open_request(port, stream=stream)
        await until(lambda: len(engine.named("generate")) == 2)
        if stream and not paused:
            await asyncio.wait_for(reader.readuntil(b"data: "), 5)
        writer.close()
        await until(lambda: len(engine.aborted) == 2)
        status = await engine.status()
        assert status.num_running == 0
        num_tokens = status.num_generated_tokens
        await asyncio.sleep(0.05)
        assert (await engine.status()).num_generated_tokens == num_tokens < 2000


async def test_leaving_while_frozen_in_the_middle() -> None:
    engine = ScriptedEngine(token_delay_s=0.005)
    async with served(engine) as port:
        reader, writer = await open_request(port, stream=True)
        await asyncio.wait_for(reader.readuntil(b"data: "), 5)
        await engine.pause_generation("keep")
        await asyncio.sleep(0.05)
        writer.close()
        await until(lambda: len(engine.aborted) == 2)


async def test_a_prompt_that_is_refused_takes_the_others_along() -> None:
    engine = ScriptedEngine(token_delay_s=0.005)
    async with served(engine) as port:
        reader, writer = await open_request(port, prompt=["fine", ""])
        status_line = await asyncio.wait_for(reader.readline(), 5)
        assert b" 422 " in status_line
        await until(lambda: len(engine.aborted) == 1)
        writer.close()
