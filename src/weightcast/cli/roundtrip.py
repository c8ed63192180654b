"""One real transfer between two processes by one transport: what ``weightcast doctor`` tries.

Run as a module this file is the worker's process. It speaks lines of JSON: it says who it is, reads the trainer's offer,
receives, and answers with the SHA-256 of the bytes that arrived.
"""

from __future__ import annotations

import hashlib
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

import msgspec
import torch

from weightcast.cuda.wait import wait_stream
from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, ErrorForm, PeerLost, TransportError, WeightcastError
from weightcast.layout import image_layout
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest, TensorSpec
from weightcast.plan import Copy, compile_plan
from weightcast.transports.base import Facts, Transport
from weightcast.transports.facts import local_facts
from weightcast.transports.registry import registry
from weightcast.untrusted.known import known


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTrip:
    """A transfer that worked: bytes, and the seconds that the worker took to receive them."""

    nbytes: int
    seconds: float


class _Offer(msgspec.Struct, frozen=True, kw_only=True):
    transport: str
    offer: bytes
    nbytes: int
    timeout_s: float


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    sha256: str = ""
    seconds: float = 0.0
    error: ErrorForm | None = None


def try_transport(name: str, *, nbytes: int = 16 * 2**20, timeout_s: float = 60.0) -> RoundTrip:
    """Move random bytes to a process started for it, and compare. Raises the error of the side that failed, or Unsupported.

    Leaves nothing behind: the process has ended when this returns or raises.
    """
    deadline = Deadline(timeout_s)
    transport = registry().get(name)
    ours, theirs = devices_for(transport)
    payload = torch.randint(0, 256, (nbytes,), dtype=torch.uint8).to(ours)
    expected = _sha256(payload)
    with _worker(deadline, theirs, shares_gpu=ours.type == "cuda" and ours == theirs) as worker:
        reason = transport.refusal(local_facts(ours), msgspec.json.decode(worker.read(), type=known(Facts)))
        if reason is not None:
            raise TransportError(f"{name}: {reason}")
        memory = transport.adopt(Memory([payload]))
        try:
            end = transport.trainer_end(_copies(nbytes), memory, address="127.0.0.1")
            try:
                offer = _Offer(transport=name, offer=end.offer(), nbytes=nbytes, timeout_s=timeout_s)
                worker.write(msgspec.json.encode(offer))
                end.connect(deadline)
                end.send(deadline)
                answer = msgspec.json.decode(worker.read(), type=known(_Answer))
            finally:
                end.close()
        finally:
            transport.release(memory)
    if answer.error is not None:
        raise answer.error.error()
    if answer.sha256 != expected:
        raise TransportError(f"{name} delivered other bytes than were sent")
    return RoundTrip(nbytes=nbytes, seconds=answer.seconds)


def devices_for(transport: Transport) -> tuple[torch.device, torch.device]:
    """Where trainer and worker hold their weights: in the host's memory if the transport moves that, else on GPUs (two, where there are
    two), or the worker's alone."""
    cpu = torch.device("cpu")
    pairs = [(cpu, cpu)]
    if torch.cuda.is_available():
        first, last = torch.device("cuda", 0), torch.device("cuda", torch.cuda.device_count() - 1)
        pairs += [(cpu, last), (first, last)]
    for ours, theirs in pairs:
        worker = local_facts(theirs, "127.0.0.1")
        if (
            transport.refusal(local_facts(ours, "127.0.0.1"), msgspec.structs.replace(worker, pid=worker.pid + 1))
            is None
        ):
            return ours, theirs
    return pairs[-1]


def _sha256(data: torch.Tensor) -> str:
    return hashlib.sha256(data.cpu().numpy().tobytes()).hexdigest()


def _copies(nbytes: int) -> tuple[Copy, ...]:
    manifest = Manifest.of([TensorSpec(name="payload", dtype="uint8", shape=(nbytes,))])
    layout = image_layout(manifest)
    return tuple(compile_plan(manifest, {0: layout}, layout)[0])


class _Lines:
    """The worker's process as lines in and out, with a deadline."""

    def __init__(self, process: subprocess.Popen[bytes], deadline: Deadline) -> None:
        self._process = process
        self._deadline = deadline
        self._pending = b""

    def write(self, line: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerLost("the worker's process ended") from None

    def read(self) -> bytes:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._pending:
                if not selector.select(self._deadline.remaining_s()):
                    raise DeadlineExceeded(f"no answer of the worker's process in {self._deadline.timeout_s:g} s")
                piece = os.read(self._process.stdout.fileno(), 65536)
                if not piece:
                    raise PeerLost("the worker's process ended without an answer")
                self._pending += piece
        line, _, self._pending = self._pending.partition(b"\n")
        return line


@contextmanager
def _worker(deadline: Deadline, device: torch.device, *, shares_gpu: bool) -> Iterator[_Lines]:
    environment = dict(os.environ)
    if shares_gpu:
        # NCCL takes two ranks on one GPU only where they call themselves different hosts.
        environment["NCCL_HOSTID"] = f"weightcast-doctor-{os.getpid()}"
    process = subprocess.Popen(
        [sys.executable, "-m", "weightcast.cli.roundtrip", str(device)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield _Lines(process, deadline)
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            stream.close()


def main(requests: IO[bytes], answers: IO[bytes], device: torch.device) -> None:
    """The worker's side: one transfer to ``device``, then the end."""

    def say(line: bytes) -> None:
        answers.write(line + b"\n")
        answers.flush()

    say(msgspec.json.encode(local_facts(device)))
    request = msgspec.json.decode(requests.readline(), type=known(_Offer))
    try:
        say(msgspec.json.encode(_receive(request, device)))
    except WeightcastError as error:
        say(msgspec.json.encode(_Answer(error=ErrorForm.of(error))))
    requests.readline()  # Stay until the trainer has closed its side.


def _receive(request: _Offer, device: torch.device) -> _Answer:
    deadline = Deadline(request.timeout_s)
    memory = Memory([torch.zeros(request.nbytes, dtype=torch.uint8, device=device)])
    if device.type == "cuda":
        wait_stream(device, deadline, "clearing memory")
    end = registry().get(request.transport).worker_end(request.offer, _copies(request.nbytes))
    try:
        end.connect(deadline)
        began = time.perf_counter()
        end.receive(memory, deadline)
        seconds = time.perf_counter() - began
    finally:
        end.close()
    return _Answer(sha256=_sha256(memory.storages[0]), seconds=seconds)


if __name__ == "__main__":
    main(sys.stdin.buffer, sys.stdout.buffer, torch.device(sys.argv[1]))
