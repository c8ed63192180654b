"""What does publish() to many engines cost, and how many threads and descriptors does it take?

The trainer is one process. Engines are simulated: a few other processes each play many engines, each with its own URL, its own
connection to the control channel and its own answers; what a process gets of the weights (over shm) it gets once for all of its engines.
So the machine's two cores are busy with what a fleet costs beside the weights.

Columns: engines; milliseconds of connect(), and of publish(), the median of some rounds, and per engine; milliseconds of processor time of
the trainer in a round; the most threads and descriptors of the trainer, during rounds.

    python benchmarks/scale_engines.py [--engines 1 16 64 256 1024] [--rounds 7] [--processes 4]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import resource
import statistics
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import msgspec
import torch
import zmq
import zmq.asyncio
from rich.console import Console
from rich.table import Table

from weightcast import Publisher
from weightcast.control.pieces import Joiner, cut
from weightcast.control.pump import set_options
from weightcast.deadline import Deadline
from weightcast.layout import image_layout
from weightcast.layout.memory import Memory
from weightcast.layout.table import LayoutTable
from weightcast.messages import (
    MAX_FRAME_NBYTES,
    AnyMessage,
    Begin,
    Committed,
    Hello,
    Landings,
    Message,
    Ready,
    Setup,
    Staged,
    Verified,
    Welcome,
    decode,
    encode,
)
from weightcast.plan import Holdings, compile_plan
from weightcast.transports.base import WorkerEnd
from weightcast.transports.facts import local_facts
from weightcast.transports.registry import registry

TOKEN = "benchmark"
TIMEOUT_S = 120.0
WATCHED_ROUNDS = 3
TENSORS = {f"layer.{number}.weight": torch.randn(64, 64) for number in range(100)}


class Weights:
    """The weights of all engines of one process."""

    def __init__(self) -> None:
        self._end: WorkerEnd | None = None
        self._plan_digest = ""
        self._digests: dict[tuple[int, int], int] = {}
        self._epoch = 0

    def welcome(self, welcome: Welcome) -> Landings:
        self._manifest = welcome.manifest
        layout = image_layout(welcome.manifest)
        self._memory = Memory([torch.zeros(layout.storage_nbytes, dtype=torch.uint8)], is_arena=True)
        self._table = LayoutTable.of(layout, welcome.manifest)
        return Landings(layout=self._table, mode="staged", shadow_nbytes=layout.storage_nbytes[0], shadow="cpu")

    def set_up(self, setup: Setup) -> Ready:
        if setup.epoch != self._epoch:
            plan = compile_plan(self._manifest, Holdings.told(self._manifest, setup.holdings), self._table)
            (offer,) = setup.offers
            self._end = registry().get(offer.transport).worker_end(offer.data, plan[0])
            self._end.connect(Deadline(TIMEOUT_S))
            self._epoch, self._plan_digest = setup.epoch, plan.digest
        return Ready(epoch=setup.epoch, plan_digest=self._plan_digest)

    def receive(self, begin: Begin) -> int:
        """The digest of what came; it comes for the first engine that is told to begin the round."""
        if (begin.epoch, begin.round) not in self._digests:
            assert self._end is not None
            _, digest = self._end.receive_proven(self._memory, self._manifest, Deadline(TIMEOUT_S))
            if digest is None:
                from weightcast.content.layout_digest import LayoutDigest

                layout = self._table.layout(self._manifest)
                digest = LayoutDigest(self._manifest, layout, gaps_are_zero=True).of(self._memory)
            self._digests = {(begin.epoch, begin.round): digest}
        return self._digests[begin.epoch, begin.round]


class Engine:
    """One engine: a connection to the trainer, and the answers of its server."""

    def __init__(self, context: zmq.asyncio.Context, weights: Weights) -> None:
        self._context, self._weights = context, weights
        self._socket: zmq.asyncio.Socket | None = None
        self._listening: asyncio.Task[None] | None = None
        self._joined = asyncio.Event()
        self._verified: dict[int, asyncio.Future[Verified]] = {}
        self._version, self._digest = "default", ""

    async def answer(self, method: str, path: str, body: bytes) -> dict[str, Any]:
        if path.startswith("/get_world_size"):
            return {"world_size": 1}
        if path == "/weightcast/init":
            await self._join(msgspec.json.decode(body)["init_info"])
            return {}
        if path == "/weightcast/commit":
            return await self._commit(msgspec.json.decode(body))
        return {"weight_version": self._version, "digest": self._digest, "dirty": False, "ready": True}

    async def _join(self, info: dict[str, Any]) -> None:
        self._socket = socket = self._context.socket(zmq.DEALER)
        set_options(socket, info["silence_s"])
        public, secret = zmq.curve_keypair()
        socket.curve_publickey, socket.curve_secretkey = public, secret
        socket.curve_serverkey = info["public_key"].encode()
        socket.connect(info["address"])
        facts = local_facts(torch.device("cpu"))
        about = {"version": "default", "digest": "", "dirty": False, "highest": 0}
        hello = Hello(ticket=info["ticket"], engine=info["engine"], rank=0, world_size=1, facts=facts, **about)
        await self._say(hello)
        self._listening = asyncio.create_task(self._listen(socket))
        await self._joined.wait()

    async def _say(self, message: Message) -> None:
        assert self._socket is not None
        for piece in cut(encode(message)):
            await self._socket.send(piece)

    async def _listen(self, socket: zmq.asyncio.Socket) -> None:
        joiner = Joiner()
        while True:
            frame = joiner.add(await socket.recv(), MAX_FRAME_NBYTES)
            if frame is not None:
                await self._hear(decode(frame))

    async def _hear(self, message: AnyMessage) -> None:
        match message:
            case Welcome():
                await self._say(self._weights.welcome(message))
                self._joined.set()
            case Setup():
                await self._say(self._weights.set_up(message))
            case Begin():
                digest, at = self._weights.receive(message), {"epoch": message.epoch, "round": message.round}
                await self._say(Staged(digest=digest, nbytes=0, transfer_s=0.0, digest_s=0.0, **at))
            case Verified():
                self._approval(message.round).set_result(message)

    def _approval(self, round: int) -> asyncio.Future[Verified]:
        return self._verified.setdefault(round, asyncio.get_running_loop().create_future())

    async def _commit(self, order: dict[str, Any]) -> dict[str, Any]:
        approval = await self._approval(order["round"])
        self._verified.clear()
        self._version, self._digest = approval.version, approval.content
        at = {"epoch": order["epoch"], "round": order["round"]}
        digest = self._weights.receive(Begin(base=None, timeout_s=1.0, **at))
        await self._say(Committed(digest=digest, nbytes=0, transfer_s=0.0, apply_s=0.0, digest_s=0.0, **at))
        return {"version": approval.version, "phases": {"apply": 0.0}}


async def _serve_one(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    answer: Callable[[str, str, bytes], Awaitable[dict[str, Any]]],
) -> None:
    """One request of a connection of its own, as weightcast's clients make them."""
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        method, path, _ = head.split(" ", 2)
        lengths = [line for line in head.lower().split("\r\n") if line.startswith("content-length:")]
        body = await reader.readexactly(int(lengths[0].split(":")[1])) if lengths else b""
        content = msgspec.json.encode(await answer(method, path, body))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n")
        writer.write(b"content-length: %d\r\n\r\n" % len(content) + content)
        await writer.drain()
    writer.close()


def play(count: int, pipe: Connection) -> None:
    """The life of a process that plays so many engines."""

    async def life() -> None:
        context, weights = zmq.asyncio.Context(), Weights()
        engines = [Engine(context, weights) for _ in range(count)]

        async def answer(method: str, path: str, body: bytes) -> dict[str, Any]:
            _, number, rest = path.split("/", 2)
            return await engines[int(number)].answer(method, f"/{rest}", body)

        server = await asyncio.start_server(lambda r, w: _serve_one(r, w, answer), "127.0.0.1", 0, backlog=4096)
        pipe.send(server.sockets[0].getsockname()[1])
        await asyncio.get_running_loop().run_in_executor(None, pipe.recv)

    torch.set_num_threads(1)
    asyncio.run(life())
    os._exit(0)


@contextlib.contextmanager
def engines(count: int, processes: int) -> Iterator[list[str]]:
    """The URLs of so many engines."""
    context = multiprocessing.get_context("spawn")
    shares = [count // processes + (number < count % processes) for number in range(min(processes, count))]
    pipes, children = [], []
    for share in shares:
        ours, theirs = context.Pipe()
        child = context.Process(target=play, args=(share, theirs), daemon=True)
        child.start()
        pipes.append(ours)
        children.append(child)
    try:
        ports = [pipe.recv() for pipe in pipes]
        yield [f"http://127.0.0.1:{port}/{n}" for port, share in zip(ports, shares, strict=True) for n in range(share)]
    finally:
        for pipe in pipes:
            pipe.send(None)
        for child in children:
            child.join()


class Watch:
    """The most threads and descriptors of this process while inside."""

    def __enter__(self) -> Watch:
        self.threads = self.descriptors = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(0.01):
            self.threads = max(self.threads, len(os.listdir("/proc/self/task")) - 1)  # without this one
            self.descriptors = max(self.descriptors, len(os.listdir("/proc/self/fd")))

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def measure(count: int, rounds: int, processes: int) -> list[str]:
    """One line of the table."""
    tensors = {name: value.clone() for name, value in TENSORS.items()}
    with engines(count, processes) as urls, Publisher(tensors, urls, token=TOKEN, timeout_s=TIMEOUT_S) as publisher:
        start = time.perf_counter()
        publisher.connect()
        connect_s = time.perf_counter() - start
        took, busy = [], []
        for _ in range(rounds):
            for value in tensors.values():
                value.normal_()
            start, before = time.perf_counter(), time.process_time()
            publisher.publish()
            took.append(time.perf_counter() - start)
            busy.append(time.process_time() - before)
        with (
            Watch() as watch
        ):  # in rounds that are not timed: looking through thousands of descriptors takes time of its own
            for _ in range(WATCHED_ROUNDS):
                publisher.publish()
    publish_ms, busy_ms = statistics.median(took) * 1e3, statistics.median(busy) * 1e3
    numbers = (connect_s * 1e3, publish_ms, publish_ms / count, busy_ms)
    return [str(count), *(f"{number:.1f}" for number in numbers), str(watch.threads), str(watch.descriptors)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--engines", type=int, nargs="+", default=[1, 16, 64, 256, 1024])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--processes", type=int, default=4)
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    table = Table("engines", "connect ms", "publish ms", "per engine", "trainer's core ms", "threads", "descriptors")
    for count in options.engines:
        table.add_row(*measure(count, options.rounds, options.processes))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
