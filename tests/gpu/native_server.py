"""A server that speaks vLLM's HTTP dialect in front of one VllmNcclEngine, in a process of its own."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import msgspec
import torch

from weightcast.errors import WeightcastError
from weightcast.layout import Layout
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest
from weightcast.receiver.base import LiveModel
from weightcast.vllm_protocol.nccl import worker as vllm_nccl
from weightcast.weight_transfer.base import WorkerRank
from weightcast.weight_transfer.config import WeightTransferConfig


class KeepingModel(LiveModel):
    """A model whose loader keeps a copy of what it is given."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", 0)
        self.tensors: dict[str, torch.Tensor] = {}

    def layout(self, manifest: Manifest) -> Layout:
        raise NotImplementedError

    def memory(self) -> Memory:
        return Memory([])

    def rebind(self, memory: Memory) -> None:
        raise NotImplementedError

    def load_weights(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            self.tensors[name] = tensor.clone()

    def checksums(self) -> dict[str, str]:
        return {}


class NativeServer:
    """``start`` returns the port; ``paths`` the calls that came in."""

    def __init__(self) -> None:
        os.environ["NCCL_HOSTID"] = f"test-{os.getpid()}"
        os.environ["NCCL_SOCKET_IFNAME"] = "lo"
        self.model = KeepingModel()
        self.engine = vllm_nccl.VllmNcclEngine(WeightTransferConfig(backend="nccl"), self.model, WorkerRank())
        self.calls: list[str] = []
        self.errors: list[str] = []

    def listen(self, version: str, timeout_s: float) -> int:
        vllm_nccl.TIMEOUT_S = timeout_s
        subject = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version: ClassVar[str] = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer(200, {"version": version} if self.path == "/version" else {"world_size": 1})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                try:
                    subject.post(self.path, msgspec.json.decode(body) if body else {})
                except WeightcastError as error:
                    subject.errors.append(type(error).__name__)
                    self._answer(500, {"error": str(error)})
                else:
                    self._answer(200, {"message": "done"})

            def _answer(self, status: int, value: dict[str, Any]) -> None:
                content = msgspec.json.encode(value)
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return int(server.server_address[1])

    def post(self, path: str, body: dict[str, Any]) -> None:
        self.calls.append(path)
        engine = self.engine
        if path == "/init_weight_transfer_engine":
            engine.init_transfer_engine(engine.parse_init_info(body["init_info"]))
        elif path == "/start_weight_update":
            engine.start_weight_update()
        elif path == "/update_weights":
            engine.update_weights(engine.parse_update_info(body["update_info"]))
        elif path == "/finish_weight_update":
            engine.finish_weight_update(body.get("weight_version"))

    def state(self) -> tuple[list[str], list[str], str, bool]:
        return self.calls, self.errors, self.engine.weight_version, self.engine.dirty

    def contents(self) -> dict[str, bytes]:
        return {
            name: tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes()
            for name, tensor in self.model.tensors.items()
        }
