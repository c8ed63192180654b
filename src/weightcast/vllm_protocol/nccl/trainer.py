"""Publishing to a stock vLLM server that has no weightcast installed, over its native ``nccl`` backend.

The server needs VLLM_SERVER_DEV_MODE=1 and ``--weight-transfer-config '{"backend": "nccl"}'``. Four phases over HTTP, tensors packed
into chunks and broadcast. Here every wait ends by its deadline with a named error; a stock server that waits for a dead trainer
does not, and has to be restarted then. What this wire lacks: staging, digests, a way back.
"""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

from weightcast.cuda.nccl import Communicator, new_unique_id
from weightcast.cuda.wait import new_event, new_stream
from weightcast.deadline import Deadline
from weightcast.errors import (
    DeadlineExceeded,
    EngineError,
    StateError,
    Unsupported,
    WeightcastError,
)
from weightcast.manifest import TensorSpec
from weightcast.manifest.dtypes import name_of
from weightcast.quoted import quoted
from weightcast.trainer.clients import wire
from weightcast.trainer.clients.urls import endpoint_of
from weightcast.vllm_protocol.nccl.wire import (
    DEFAULT_BUFFER_NBYTES,
    DEFAULT_NUM_BUFFERS,
    Chunk,
    chunks_of,
    serve_unique_id,
)

_PACKED_AT_INIT = (0, 28)
_ID_IN_MESSAGE = (0, 30)
"""From these versions on the fields for packing, and the id, are part of init_info."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeReport:
    """One update: bytes sent, and seconds by phase ("pause", "start", "transfer", "finish", "resume")."""

    version: str | None
    nbytes: int
    phases: Mapping[str, float] = field(default_factory=dict)


class VllmNativePublisher:
    """Rank 0 of an NCCL group with all workers of one stock vLLM server.

    ``tensors`` are checkpoint tensors by name, on one GPU; their current values are sent by each ``publish``. Use it as a
    context manager. After an error it has to be connected again.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        url: str,
        *,
        token: str | None = None,
        address: str = "127.0.0.1",
        timeout_s: float = 300.0,
        buffer_nbytes: int = DEFAULT_BUFFER_NBYTES,
        pause: str | None = "keep",
    ) -> None:
        devices = {tensor.device for tensor in tensors.values()}
        if len(devices) != 1 or any(device.type != "cuda" for device in devices):
            raise Unsupported("vLLM's nccl backend needs all tensors on one GPU", hint="Gather them there first")
        self._tensors = dict(tensors)
        self._device = devices.pop()
        self._specs = [
            TensorSpec(name=name, dtype=name_of(tensor.dtype), shape=tuple(tensor.shape))
            for name, tensor in self._tensors.items()
        ]
        self._server = _Server(url, token)
        self._address = address
        self._timeout_s = timeout_s
        self._buffer_nbytes = buffer_nbytes
        self._pause = pause
        self._comm: Communicator | None = None
        self._packed_at_init = True

    def __enter__(self) -> VllmNativePublisher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: object) -> None:
        self.close()

    def connect(self) -> None:
        """Have all workers join; returns when NCCL works between all of them."""
        self.close()
        deadline = Deadline(self._timeout_s)
        version = self._server.version(deadline)
        world_size = int(self._server.call("GET", "/get_world_size", deadline)["world_size"]) + 1
        self._packed_at_init = version >= _PACKED_AT_INIT
        unique_id = new_unique_id()
        info: dict[str, Any] = {"rank_offset": 1, "world_size": world_size}
        store = None
        if version >= _ID_IN_MESSAGE:
            info["nccl_unique_id_b64"] = base64.b64encode(unique_id).decode()
        else:
            store = serve_unique_id(self._address, unique_id, world_size)
            info.update(master_address=self._address, master_port=store.port)
        if self._packed_at_init:
            info.update(self._packing())
        comm = Communicator(self._device)
        try:
            with self._server.meanwhile("/init_weight_transfer_engine", {"init_info": info}, deadline) as check:
                comm.watch(check)
                comm.connect(unique_id, 0, world_size, deadline)
                # Named: memory that is freed under a running collective belongs to somebody else.
                probe = torch.zeros(1, dtype=torch.float32, device=self._device)
                comm.all_reduce(probe, deadline)
                comm.finish(deadline, "the first all-reduce")
        except BaseException:
            # NCCL may be connected and the server's answer still an error.
            comm.abort()
            raise
        # It held the id until every rank had it.
        del store
        self._comm = comm

    def publish(self, version: str | None = None) -> NativeReport:
        """Send all tensors and have the server use them from its next step on; ``version`` is its label for them."""
        if self._comm is None:
            raise StateError("not connected to the server", hint="Call connect() first")
        deadline, phases = Deadline(self._timeout_s), _Phases()
        update = {
            "names": [spec.name for spec in self._specs],
            "dtype_names": [spec.dtype for spec in self._specs],
            "shapes": [list(spec.shape) for spec in self._specs],
        }
        if not self._packed_at_init:
            update.update(self._packing())
        try:
            with self._paused(deadline, phases):
                with phases.timed("start"):
                    self._server.call("POST", "/start_weight_update", deadline, {})
                with phases.timed("transfer"):
                    nbytes = self._send(update, deadline)
                with phases.timed("finish"):
                    body = {} if version is None else {"weight_version": version}
                    self._server.call("POST", "/finish_weight_update", deadline, body)
                    self._server.call("POST", "/reset_prefix_cache", deadline, {})
        except BaseException:
            self.close()
            raise
        return NativeReport(version=version, nbytes=nbytes, phases=dict(phases.seconds))

    def close(self) -> None:
        """Leave the group; idempotent. The server keeps its weights."""
        comm, self._comm = self._comm, None
        if comm is not None:
            comm.abort()

    def _packing(self) -> dict[str, Any]:
        return {
            "packed": True,
            "packed_buffer_size_bytes": self._buffer_nbytes,
            "packed_num_buffers": DEFAULT_NUM_BUFFERS,
        }

    @contextmanager
    def _paused(self, deadline: Deadline, phases: _Phases) -> Iterator[None]:
        if self._pause is None:
            yield
            return
        with phases.timed("pause"):
            self._server.call("POST", f"/pause?mode={self._pause}", deadline)
        yield
        # Not after a failure: weights of no version must not be served.
        with phases.timed("resume"):
            self._server.call("POST", "/resume", deadline)

    def _send(self, update: Mapping[str, Any], deadline: Deadline) -> int:
        comm = self._comm
        assert comm is not None
        with self._server.meanwhile("/update_weights", {"update_info": update}, deadline) as check:
            comm.watch(check)
            packing = new_stream(self._device)
            packing.wait_stream(torch.cuda.current_stream(self._device))
            sent: list[torch.cuda.Event] = []
            for chunk in chunks_of(self._specs, self._buffer_nbytes):
                if len(sent) >= DEFAULT_NUM_BUFFERS:
                    comm.wait(sent[-DEFAULT_NUM_BUFFERS], deadline, "sending weights")
                with torch.cuda.stream(packing):
                    buffer = self._pack(chunk)
                buffer.record_stream(comm.stream)
                comm.stream.wait_stream(packing)
                if chunk.nbytes:
                    comm.broadcast(buffer, 0, deadline)
                event = new_event()
                event.record(comm.stream)
                sent.append(event)
            comm.finish(deadline, "sending weights")
        return sum(spec.nbytes for spec in self._specs)

    @torch.no_grad()
    def _pack(self, chunk: Chunk) -> torch.Tensor:
        buffer = torch.empty(chunk.nbytes, dtype=torch.uint8, device=self._device)
        parts, values = [], []
        for spec, offset in zip(chunk.specs, chunk.offsets, strict=True):
            tensor = self._tensors[spec.name]
            if tuple(tensor.shape) != spec.shape or name_of(tensor.dtype) != spec.dtype:
                raise StateError(f"{spec.name} is no longer {spec.dtype} {spec.shape}", hint="Make a new publisher")
            if spec.nbytes:
                parts.append(buffer[offset : offset + spec.nbytes])
                values.append(tensor.detach().contiguous().view(-1).view(torch.uint8))
        if parts:
            torch._foreach_copy_(parts, values)
        return buffer


class _Phases:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - start


class _Server:
    """vLLM's HTTP routes, each call with the round's deadline and a connection of its own."""

    def __init__(self, url: str, token: str | None) -> None:
        self._endpoint = endpoint_of(url, token)
        self._url = self._endpoint.url

    def version(self, deadline: Deadline) -> tuple[int, ...]:
        """The server's vLLM version; a server that does not tell is taken for the newest."""
        try:
            text = str(self.call("GET", "/version", deadline).get("version", ""))
        except EngineError:
            return (999,)
        numbers = [part for part in text.split(".")[:2] if part.isdigit()]
        return tuple(map(int, numbers)) or (999,)

    def call(self, method: str, path: str, deadline: Deadline, body: Any = None) -> dict[str, Any]:
        """The JSON object that the server answers; EngineError carries what it says instead."""
        deadline.check(f"{method} {path}")
        content = None if body is None else msgspec.json.encode(body)
        try:
            response = wire.request(method, self._endpoint, path, content, deadline)
        except wire.FAILURES as error:
            raise wire.failure(error, f"{method} {path}", self._url, deadline) from None
        if not 200 <= response.status < 300:
            text = quoted(response.content[:2000].decode(errors="replace"))
            raise EngineError(f"{method} {path} answered {response.status}: {text}", engine=self._url)
        try:
            value = msgspec.json.decode(response.content)
        except msgspec.DecodeError:
            return {}
        return value if isinstance(value, dict) else {}

    @contextmanager
    def meanwhile(self, path: str, body: Any, deadline: Deadline) -> Iterator[Callable[[], None]]:
        """POST on another thread while the block runs; leaving waits for the answer.

        Yields a check that raises the call's error as soon as it failed, for the block's own waits.
        """
        errors: list[WeightcastError] = []

        def post() -> None:
            try:
                self.call("POST", path, deadline, body)
            except WeightcastError as error:
                errors.append(error)

        def check() -> None:
            if errors:
                raise errors[0]

        thread = threading.Thread(target=post, name="weightcast-vllm-post", daemon=True)
        thread.start()
        yield check
        thread.join(deadline.remaining_s() + 1.0)
        check()
        if thread.is_alive():
            raise DeadlineExceeded(f"POST {path} took longer than {deadline.timeout_s:g} s", engine=self._url)
