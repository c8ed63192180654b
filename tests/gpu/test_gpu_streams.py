"""Streams of GPU tensors: one buffer that is NaN around each yield, tensors that another stream computes, windows that are used again."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch

from weightcast import Publisher, StreamSource
from weightcast.errors import StateError
from weightcast.testing.peer_engine import PeerEngine

pytest.importorskip("triton", reason="needs a CUDA build of torch")

DEVICE, PULL, PUSH = "cuda", "cuda_ipc", "nccl"
SHAPES = {
    "wide": ((300, 4096), "bfloat16"),
    "scale": ((7,), "bfloat16"),
    "embed": ((5000, 513), "bfloat16"),
    "deep": ((2000, 1024), "float32"),
    "eight": ((33, 65), "float8_e4m3fn"),
    "norm": ((64,), "float32"),
    "steps": ((), "int64"),
}
WINDOW_NBYTES = 4 * 2**20
"""The largest tensors are cut into several windows."""
BUSY = 2048

Tensors = dict[str, torch.Tensor]


def fresh() -> Tensors:
    return {
        name: torch.randn(shape).mul(9).to(device=DEVICE, dtype=getattr(torch, dtype))
        for name, (shape, dtype) in SHAPES.items()
    }


def contents(values: Tensors) -> dict[str, bytes]:
    return {
        name: value.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes() for name, value in values.items()
    }


def poisoned(values: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors in one buffer, which holds other bytes once the iterator goes on."""
    buffer = torch.empty(max(value.nbytes for value in values.values()), dtype=torch.uint8, device=DEVICE)
    for name, value in values.items():
        tensor = buffer[: value.nbytes].view(value.dtype).view(value.shape)
        tensor.copy_(value)
        yield name, tensor
        buffer.fill_(255)


def late_on(values: Tensors, side: torch.cuda.Stream, busy: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that another stream writes long after they were yielded, and overwrites as soon as the iterator goes on."""
    buffer = torch.empty(max(value.nbytes for value in values.values()), dtype=torch.uint8, device=DEVICE)
    for name, value in values.items():
        tensor = buffer[: value.nbytes].view(value.dtype).view(value.shape)
        with torch.cuda.stream(side):
            for _ in range(20):
                torch.mm(busy, busy)
            tensor.copy_(value)
        yield name, tensor
        with torch.cuda.stream(side):
            buffer.fill_(255)


@pytest.fixture
def engine() -> Iterator[PeerEngine]:
    with PeerEngine() as made:
        yield made


def form() -> list[tuple[str, str, tuple[int, ...]]]:
    return [(name, dtype, shape) for name, (shape, dtype) in SHAPES.items()]


WAYS = {"rebound": {}, "exchanged": {"relocatable": False}}


@pytest.mark.parametrize(("transport", "way"), list(itertools.product((PULL, PUSH), WAYS)))
def test_one_buffer_that_is_overwritten_around_each_yield_arrives_exactly(
    engine: PeerEngine, transport: str, way: str
) -> None:
    engine.build(SHAPES, device=DEVICE, mode="staged", **WAYS[way])
    values = fresh()
    source = StreamSource(lambda: poisoned(values), window_nbytes=WINDOW_NBYTES)
    with Publisher(source, [engine], transport=transport, timeout_s=60) as publisher:
        for _ in range(4):
            values = fresh()
            report = publisher.publish()
            assert report.digests_match
            assert report.engines[0].workers[0].transport == transport
            assert engine.peer.call("contents") == contents(values)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs streams")
@pytest.mark.parametrize("transport", [PULL, PUSH])
def test_tensors_that_another_stream_computes_late_arrive_exactly(engine: PeerEngine, transport: str) -> None:
    engine.build(SHAPES, device=DEVICE, mode="staged")
    side, busy = torch.cuda.Stream(), torch.randn(BUSY, BUSY, device=DEVICE)  # type: ignore[no-untyped-call]
    source = StreamSource(metadata=form(), window_nbytes=WINDOW_NBYTES, device=DEVICE)
    with Publisher(source, [engine], transport=transport, timeout_s=60) as publisher:
        for _ in range(3):
            values = fresh()
            torch.cuda.synchronize()
            assert publisher.publish(late_on(values, side, busy)).digests_match
            assert engine.peer.call("contents") == contents(values)
            # A stream that the iterator's own block leaves current is the next step's, too.
            values = fresh()
            torch.cuda.synchronize()
            assert publisher.publish(within(side, values, busy)).digests_match
            assert engine.peer.call("contents") == contents(values)


def within(side: torch.cuda.Stream, values: Tensors, busy: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    with torch.cuda.stream(side):
        for name, value in values.items():
            assert torch.cuda.current_stream() == side
            for _ in range(20):
                torch.mm(busy, busy)
            tensor = value.clone()
            yield name, tensor
            tensor.view(torch.uint8).fill_(255) if tensor.dim() else tensor.fill_(255)


@pytest.mark.parametrize("transport", [PULL, PUSH])
def test_a_stream_that_ends_early_harms_no_engine(engine: PeerEngine, transport: str) -> None:
    engine.build(SHAPES, device=DEVICE, mode="staged")
    source = StreamSource(metadata=form(), window_nbytes=WINDOW_NBYTES, device=DEVICE)
    cut: Callable[[Tensors], Iterator[tuple[str, torch.Tensor]]] = lambda given: itertools.islice(poisoned(given), 4)  # noqa: E731
    with Publisher(source, [engine], transport=transport, timeout_s=60) as publisher:
        served = fresh()
        publisher.publish(poisoned(served))
        with pytest.raises(StateError, match="ended before 'eight'"):
            publisher.publish(cut(fresh()))
        assert engine.peer.call("contents") == contents(served)
        values = fresh()
        assert publisher.publish(poisoned(values)).digests_match
        assert engine.peer.call("contents") == contents(values)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU's memory")
def test_tensors_in_host_memory_are_published_through_windows_of_the_gpu(engine: PeerEngine) -> None:
    engine.build(SHAPES, device=DEVICE, mode="staged")
    values = {name: value.cpu() for name, value in fresh().items()}
    source = StreamSource(lambda: values.items(), window_nbytes=WINDOW_NBYTES, device=DEVICE)
    with Publisher(source, [engine], transport=PULL, timeout_s=60) as publisher:
        for _ in range(2):
            values = {name: value.cpu() for name, value in fresh().items()}
            assert publisher.publish().digests_match
            assert engine.peer.call("contents") == contents(values)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU's memory")
def test_a_model_through_a_window_takes_the_windows_memory_and_no_more(engine: PeerEngine) -> None:
    """1 GiB of weights through 128 MiB."""
    count, shape = 64, (2048, 4096)
    shapes = {f"layer.{number:02}": (shape, "bfloat16") for number in range(count)}
    engine.build(shapes, device=DEVICE, mode="staged")
    buffer, seed = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE), 0

    def produced() -> Iterator[tuple[str, torch.Tensor]]:
        for number, name in enumerate(shapes):
            buffer.fill_(number + seed + 1)
            yield name, buffer

    source = StreamSource(produced, window_nbytes=2**27)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with Publisher(source, [engine], transport=PULL, timeout_s=60) as publisher:
        for seed in (0, 64):  # noqa: B007 - read by the stream
            assert publisher.publish().digests_match
    most = torch.cuda.max_memory_allocated() - before
    assert 2**27 <= most < 2**27 + 2**25, f"{most / 2**20:.0f} MiB"
