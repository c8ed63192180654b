"""Both ends of vLLM's nccl backend over a wire that is a list: what is sent, what is left after a failure. No GPU."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from weightcast.deadline import Deadline
from weightcast.errors import EngineError, PeerLost, PlanMismatch, StateError
from weightcast.manifest import TensorSpec
from weightcast.testing.local_engine import DictModel
from weightcast.vllm_protocol.nccl import trainer as vllm_native
from weightcast.vllm_protocol.nccl import worker as vllm_nccl
from weightcast.vllm_protocol.nccl.trainer import VllmNativePublisher
from weightcast.vllm_protocol.nccl.worker import VllmNcclEngine
from weightcast.weight_transfer import WeightTransferConfig, WorkerRank


class FakeStream:
    def wait_stream(self, other: object) -> None: ...


class FakeEvent:
    def record(self, stream: object) -> None: ...


class FakeComm:
    """A communicator whose broadcasts from rank 0 go into ``wire``, and come out of it in the other ranks."""

    wire: list[bytes]
    made: list[FakeComm]
    fails_at: str

    def __init__(self, device: torch.device, check: Callable[[], None] = lambda: None) -> None:
        self.device, self.stream, self.aborted, self._rank = device, FakeStream(), False, -1
        self._running: list[weakref.ref[torch.Tensor]] = []
        self.made.append(self)

    def watch(self, check: Callable[[], None]) -> None: ...

    def connect(self, unique_id: bytes, rank: int, world_size: int, deadline: Deadline) -> None:
        self._rank = rank

    def all_reduce(self, buffer: torch.Tensor, deadline: Deadline) -> None:
        self._running.append(weakref.ref(buffer))

    def broadcast(self, buffer: torch.Tensor, root: int, deadline: Deadline) -> None:
        assert buffer.numel(), "a broadcast of nothing"
        if self.fails_at == "broadcast":
            raise PeerLost("the trainer is gone")
        if self._rank == 0:
            self.wire.append(bytes(buffer.tolist()))
        else:
            data = self.wire.pop(0)
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def wait(self, event: object, deadline: Deadline, what: str) -> None: ...

    def finish(self, deadline: Deadline, what: str) -> None:
        assert all(buffer() is not None for buffer in self._running), "freed under a running collective"
        self._running.clear()

    def abort(self, wait_s: float = 0.0) -> None:
        self.aborted = True


class FakeServer:
    """vLLM's routes, without HTTP."""

    def __init__(self) -> None:
        self.error: EngineError | None = None

    def version(self, deadline: Deadline) -> tuple[int, ...]:
        return (0, 33)

    def call(self, method: str, path: str, deadline: Deadline, body: Any = None) -> dict[str, Any]:
        return {"world_size": 1}

    @contextlib.contextmanager
    def meanwhile(self, path: str, body: Any, deadline: Deadline) -> Iterator[Callable[[], None]]:
        yield lambda: None
        if self.error is not None:
            raise self.error


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeComm.wire, FakeComm.made, FakeComm.fails_at = [], [], ""
    for module in (vllm_native, vllm_nccl):
        monkeypatch.setattr(module, "Communicator", FakeComm)
        monkeypatch.setattr(module, "new_event", FakeEvent)
    monkeypatch.setattr(vllm_native, "new_unique_id", lambda: bytes(128))
    monkeypatch.setattr(vllm_native, "new_stream", lambda device: FakeStream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)


class GpuTensor:
    """What a publisher asks of its tensors when it is made."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype, self.shape, self.device = tensor.dtype, tensor.shape, torch.device("cuda", 0)


def publisher_of(tensors: dict[str, torch.Tensor], buffer_nbytes: int = 8) -> tuple[VllmNativePublisher, FakeServer]:
    stand_ins: Any = {name: GpuTensor(tensor) for name, tensor in tensors.items()}
    publisher = VllmNativePublisher(stand_ins, "http://127.0.0.1:9", timeout_s=5.0, buffer_nbytes=buffer_nbytes)
    publisher._tensors, publisher._device = tensors, torch.device("cpu")
    server: Any = FakeServer()
    publisher._server = server
    return publisher, server


def engine_of(tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, buffer_nbytes: int) -> VllmNcclEngine:
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    model = DictModel(zeros, through_loader=tuple(tensors))
    monkeypatch.setattr(model, "device", torch.device("cuda", 0))
    engine = VllmNcclEngine(WeightTransferConfig(backend="nccl"), model, WorkerRank())
    monkeypatch.setattr(model, "device", torch.device("cpu"))
    join(engine, buffer_nbytes)
    return engine


def join(engine: VllmNcclEngine, buffer_nbytes: int = 8) -> None:
    info = {"world_size": 2, "nccl_unique_id_b64": "A" * 170 + "A=", "packed": True}
    engine.init_transfer_engine(engine.parse_init_info({**info, "packed_buffer_size_bytes": buffer_nbytes}))


def update_of(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    specs: Sequence[TensorSpec] = [
        TensorSpec(name=name, dtype=str(tensor.dtype)[6:], shape=tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]
    return {
        "names": [spec.name for spec in specs],
        "dtype_names": [spec.dtype for spec in specs],
        "shapes": [list(spec.shape) for spec in specs],
    }


EMPTY_LAST = {"w": torch.arange(5, dtype=torch.float32), "none": torch.zeros(0, 3), "nor": torch.zeros(0)}


def test_a_last_chunk_of_empty_tensors_travels_as_nothing_on_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    publisher, _ = publisher_of(EMPTY_LAST)
    publisher.connect()
    assert publisher.publish("7").nbytes == 20
    assert len(FakeComm.wire) == 1
    engine = engine_of(EMPTY_LAST, monkeypatch, 8)
    engine.start_weight_update()
    engine.update_weights(engine.parse_update_info(update_of(EMPTY_LAST)))
    engine.finish_weight_update("7")
    assert (engine.weight_version, engine.dirty, FakeComm.wire) == ("7", False, [])
    assert isinstance(engine.model, DictModel)
    assert torch.equal(engine.model._loaded["w"], EMPTY_LAST["w"])


def test_an_update_that_fails_at_its_first_chunk_is_over_and_leaves_the_engine_dirty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engine_of(EMPTY_LAST, monkeypatch, 8)
    engine.start_weight_update()
    FakeComm.fails_at = "broadcast"
    with pytest.raises(PeerLost, match="the trainer is gone"):
        engine.update_weights(engine.parse_update_info(update_of(EMPTY_LAST)))
    assert engine.dirty
    with pytest.raises(StateError, match="no weight update is open"):
        engine.finish_weight_update("8")
    assert (engine.weight_version, engine.dirty) == ("default", True)
    FakeComm.fails_at = ""
    join(engine)
    publisher, _ = publisher_of(EMPTY_LAST)
    publisher.connect()
    publisher.publish()
    engine.start_weight_update()
    engine.update_weights(engine.parse_update_info(update_of(EMPTY_LAST)))
    engine.finish_weight_update("9")
    assert (engine.weight_version, engine.dirty) == ("9", False)


def test_tensors_that_the_model_has_no_place_for_are_refused_and_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = {"w": torch.randn(5), "b": torch.randn(3)}
    more = {"w": torch.randn(5), "layers.2.w": torch.randn(4), "b": torch.randn(3)}
    engine = engine_of(before, monkeypatch, 8)
    assert isinstance(engine.model, DictModel)
    for values, is_known in ((before, True), (more, False), (before, True)):
        publisher, _ = publisher_of(values)
        publisher.connect()
        publisher.publish()
        engine.start_weight_update()
        if is_known:
            engine.update_weights(engine.parse_update_info(update_of(values)))
            engine.finish_weight_update("7")
        else:
            with pytest.raises(PlanMismatch, match=r"no place for 1 of 3 tensors: layers\.2\.w"):
                engine.update_weights(engine.parse_update_info(update_of(values)))
        assert FakeComm.wire == [], "the trainer has sent all of it"
        assert (engine.weight_version, engine.dirty) == ("7", False)
        assert all(torch.equal(value, engine.model._loaded[name]) for name, value in before.items())


def test_a_server_that_refuses_after_nccl_connected_leaves_no_communicator() -> None:
    publisher, server = publisher_of(EMPTY_LAST)
    server.error = EngineError("POST /init_weight_transfer_engine answered 500")
    with pytest.raises(EngineError, match="answered 500"):
        publisher.connect()
    assert [comm.aborted for comm in FakeComm.made] == [True]
    with pytest.raises(StateError, match="not connected"):
        publisher.publish()
    server.error = None
    publisher.connect()
    assert [comm.aborted for comm in FakeComm.made] == [True, False]
    publisher.close()
    assert [comm.aborted for comm in FakeComm.made] == [True, True]
