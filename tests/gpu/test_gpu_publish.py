"""publish() end to end on one GPU: a trainer and engines in processes of their own, over cuda_ipc and nccl."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Mapping

import pytest
import torch
from queued import queued_digests
from torch import nn

from weightcast import Publisher
from weightcast.content.layout_digest import LayoutDigest
from weightcast.deadline import Deadline
from weightcast.errors import DigestMismatch, RoundFailed, StateError, Unsupported
from weightcast.plan.replay import GPU_BLOCK_NBYTES
from weightcast.receiver.place import CHECK_HEADROOM, free_nbytes
from weightcast.sources import ModuleSource
from weightcast.testing.local_engine import DictModel
from weightcast.testing.peer_engine import PeerEngine

pytest.importorskip("triton", reason="needs a CUDA build of torch")

DEVICE, PULL, PUSH = "cuda", "cuda_ipc", "nccl"
SHAPES = {
    "embed": ((5000, 513), "bfloat16"),
    "wide": ((300, 4096), "bfloat16"),
    "deep": ((2000, 1024), "float32"),
    "scale": ((7,), "bfloat16"),
    "eight": ((33, 65), "float8_e4m3fn"),
    "norm": ((64,), "float32"),
    "steps": ((), "int64"),
}


class Policy(nn.Module):
    """A trainer's model: parameters where an optimizer would keep them."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        for name, (shape, kept) in SHAPES.items():
            target = getattr(torch, kept)
            value = (
                torch.randn(shape)
                .mul(9)
                .to(device=DEVICE, dtype=dtype if target.is_floating_point and dtype else target)
            )
            if value.is_floating_point() and value.element_size() > 1:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    @torch.no_grad()
    def step(self) -> None:
        """New values at the same addresses."""
        for value in [*self.parameters(), *self.buffers()]:
            value.copy_(torch.randn(value.shape).mul(9))


class Masters(nn.ParameterDict):
    """The same shapes in float32."""

    def __init__(self, shapes: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
        super().__init__({name: nn.Parameter(torch.randn(shape, device=DEVICE)) for name, (shape, _) in shapes.items()})

    @torch.no_grad()
    def step(self) -> None:
        """New values at the same addresses."""
        for value in self.values():
            value.copy_(torch.randn(value.shape))


def contents(
    policy: nn.Module | Mapping[str, torch.Tensor], dtypes: dict[str, torch.dtype] | None = None
) -> dict[str, bytes]:
    found = {}
    for name, value in (policy.state_dict() if isinstance(policy, nn.Module) else policy).items():
        value = value.to((dtypes or {}).get(name, value.dtype))
        found[name] = value.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes()
    return found


@pytest.fixture
def engine() -> Iterator[PeerEngine]:
    with PeerEngine() as made:
        yield made


WAYS = {
    "in place": ({"mode": "in_place"}, 1, f"{DEVICE}:0", 0),
    "staged, rebound": ({"mode": "staged"}, 1, f"{DEVICE}:0", 1),
    "staged, exchanged": ({"mode": "staged", "relocatable": False}, 1, f"{DEVICE}:0", 1),
    "staged, two shadows": ({"mode": "staged", "relocatable": False}, 2, f"{DEVICE}:0, two copies", 2),
}


@pytest.mark.parametrize(("transport", "way"), list(itertools.product((PULL, PUSH), WAYS)))
def test_every_round_arrives(engine: PeerEngine, transport: str, way: str) -> None:
    options, shadows, place, copies = WAYS[way]
    engine.build(SHAPES, device=DEVICE, **options)
    policy = Policy()
    with Publisher(policy, [engine], transport=transport, shadows=shadows, timeout_s=30) as publisher:
        for number in range(1, 5):
            policy.step()
            report = publisher.publish()
            assert report.digests_match
            assert report.number == number
            assert engine.peer.call("contents") == contents(policy)
        worker = report.engines[0].workers[0]
        assert worker.transport == transport
        assert (worker.shadow_nbytes > 0) == (copies > 0)
        if copies and DEVICE == "cuda":
            assert worker.shadow == place


@pytest.mark.parametrize(
    ("kept", "published"),
    [
        ("bfloat16", None),
        ("bfloat16", torch.bfloat16),
        ("float32", torch.bfloat16),
        ("float32", torch.float16),
        ("float16", torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize(("transport", "way"), list(itertools.product((PULL, PUSH), WAYS)))
def test_master_weights_go_live_as_they_are_published(
    engine: PeerEngine, transport: str, way: str, kept: str, published: torch.dtype | None
) -> None:
    """float32 masters, cast through the published type to the engine's, one tensor in more than one block. The engine keeps
    another one in float32."""
    options, shadows, *_ = WAYS[way]
    shapes = {name: (shape, kept) for name, (shape, dtype) in SHAPES.items() if dtype in ("bfloat16", "float32")}
    shapes |= {"large": ((GPU_BLOCK_NBYTES // 4 // 2048 + 500, 2048), kept), "norm": (SHAPES["norm"][0], "float32")}
    engine.build(shapes, device=DEVICE, **options)
    policy = Masters(shapes)
    with Publisher(policy, [engine], transport=transport, dtype=published, shadows=shadows, timeout_s=60) as publisher:
        for number in range(3):
            policy.step()
            if number == 2:
                publisher.prepare()
            assert publisher.publish().digests_match
            expected = {name: value if published is None else value.to(published) for name, value in policy.items()}
            kinds = {name: getattr(torch, dtype) for name, (_, dtype) in shapes.items()}
            assert engine.peer.call("contents") == contents(expected, kinds)


@pytest.fixture
def queued() -> Iterator[list[LayoutDigest]]:
    """The digests that this process, the trainer, has queued."""
    if DEVICE != "cuda":
        pytest.skip("a CPU queues nothing")
    with queued_digests() as found:
        yield found


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("mode", ["in_place", "staged"])
def test_a_prepared_round_uses_the_digest_that_was_begun(
    engine: PeerEngine, queued: list[LayoutDigest], mode: str, dtype: torch.dtype | None
) -> None:
    """``dtype``: that of masters, which are cast on their way."""
    shapes = SHAPES if dtype is None else {name: value for name, value in SHAPES.items() if value[1] == "bfloat16"}
    engine.build(shapes, mode=mode, device=DEVICE)
    policy = Policy() if dtype is None else Masters(shapes)
    dtypes = {} if dtype is None else dict.fromkeys(shapes, torch.bfloat16)
    with Publisher(policy, [engine], dtype=None if dtype is None else torch.bfloat16, timeout_s=30) as publisher:
        publisher.prepare()
        assert not queued
        publisher.connect()
        side = torch.cuda.Stream()
        for number in range(6):
            # Begun for values that are not published: the later ones count.
            policy.step()
            publisher.prepare()
            policy.step()
            queued.clear()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side if number % 2 else torch.cuda.current_stream()):
                publisher.prepare()
            began = len(queued)
            assert began
            assert publisher.publish().digests_match
            assert len(queued) == began
            assert engine.peer.call("contents") == contents(policy, dtypes)
        policy.step()
        assert publisher.publish().digests_match
        assert len(queued) == 2 * began
        assert engine.peer.call("contents") == contents(policy, dtypes)


def test_values_that_change_after_prepare_end_the_round(engine: PeerEngine, queued: list[LayoutDigest]) -> None:
    engine.build(SHAPES, mode="staged", device=DEVICE)
    policy = Policy()
    with Publisher(policy, [engine], timeout_s=30) as publisher:
        publisher.publish()
        before = contents(policy)
        policy.step()
        publisher.prepare()
        policy.step()
        with pytest.raises(RoundFailed) as caught:
            publisher.publish()
        assert isinstance(next(iter(caught.value.causes.values())), DigestMismatch)
        assert engine.peer.call("contents") == before
        assert publisher.publish().digests_match
        assert engine.peer.call("contents") == contents(policy)


def test_what_was_prepared_is_forgotten_with_the_call_that_failed(
    engine: PeerEngine, queued: list[LayoutDigest], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.build(SHAPES, mode="staged", device=DEVICE)
    policy = Policy()
    with Publisher(policy, [engine], timeout_s=30) as publisher:
        publisher.publish()
        queued.clear()
        publisher.prepare()
        began = len(queued)

        def refuse(source: ModuleSource) -> None:
            raise StateError("before any digest is asked for")

        with monkeypatch.context() as patch:
            patch.setattr(ModuleSource, "fill", refuse)
            with pytest.raises(StateError, match="before any digest"):
                publisher.publish()
        policy.step()
        queued.clear()
        assert publisher.publish().digests_match
        assert len(queued) == began
        assert engine.peer.call("contents") == contents(policy)


def test_a_state_dict_cannot_be_prepared(engine: PeerEngine) -> None:
    if DEVICE != "cuda":
        pytest.skip("on a CPU there is nothing to do")
    engine.build(SHAPES, mode="staged", device=DEVICE)
    with (
        Publisher(Policy().state_dict(), [engine], timeout_s=30) as publisher,
        pytest.raises(Unsupported, match=r"publish\(\) copies"),
    ):
        publisher.prepare()


def shadow_nbytes() -> int:
    """What one staged copy of the engine's weights takes."""
    tensors = {name: torch.zeros(shape, dtype=getattr(torch, dtype)) for name, (shape, dtype) in SHAPES.items()}
    return DictModel(tensors).memory().nbytes


@pytest.mark.parametrize("transport", [PULL, PUSH])
@pytest.mark.parametrize("missing", [0, 1])
def test_a_shadow_that_has_no_room_on_the_gpu_lies_in_the_hosts_memory(
    engine: PeerEngine, transport: str, missing: int, caplog: pytest.LogCaptureFixture
) -> None:
    """``missing``: by how many bytes the GPU's free memory falls short of what a staged copy asks for."""
    if DEVICE != "cuda":
        pytest.skip("page-locked memory needs a GPU")
    nbytes = shadow_nbytes()
    place = "host memory" if missing else f"{DEVICE}:0"
    engine.peer.call("limit", math.ceil(nbytes * CHECK_HEADROOM) - missing)
    engine.build(SHAPES, mode="staged", device=DEVICE, relocatable=True)
    policy = Policy()
    with (
        caplog.at_level(logging.INFO, logger="weightcast"),
        Publisher(policy, [engine], transport=transport, timeout_s=30) as publisher,
    ):
        for _ in range(3):
            policy.step()
            report = publisher.publish()
            assert report.digests_match
            assert report.mode == "staged"
            assert engine.peer.call("contents") == contents(policy)
            worker = report.engines[0].workers[0]
            assert (worker.shadow, worker.shadow_nbytes) == (place, nbytes)
    assert f"staged, {nbytes} bytes in {place} beside the live weights" in caplog.text


def test_the_next_trainer_finds_the_room_that_the_last_ones_shadow_took() -> None:
    if DEVICE != "cuda":
        pytest.skip("only torch's allocator for GPUs keeps what was freed")
    device, nbytes = torch.device(DEVICE, 0), 1 << 30
    last = torch.empty(nbytes, dtype=torch.uint8, device=DEVICE)
    kept = torch.cuda.memory_reserved(device)
    del last
    assert torch.cuda.memory_reserved(device) == kept
    assert free_nbytes(device) > 0
    # Counted by what this process holds: others use the GPU, too.
    assert torch.cuda.memory_reserved(device) <= kept - nbytes


def test_no_room_for_a_shadow_means_in_place(engine: PeerEngine) -> None:
    if DEVICE != "cuda":
        pytest.skip("the host always has room")
    engine.peer.call("limit", 1_000_000)
    engine.build(SHAPES, device=DEVICE)
    policy = Policy()
    with Publisher(policy, [engine], timeout_s=30) as publisher:
        assert publisher.publish().mode == "in_place"
        assert engine.peer.call("contents") == contents(policy)


def test_staged_engines_share_one_communicator(monkeypatch: pytest.MonkeyPatch) -> None:
    """What both want is broadcast once; an in-place engine beside them has a pair of its own."""
    if DEVICE != "cuda":
        pytest.skip("nccl needs a GPU")
    from weightcast.cuda.nccl import Communicator

    sizes: list[int] = []
    connect = Communicator.connect

    def counted(self: Communicator, unique_id: bytes, rank: int, world_size: int, deadline: Deadline) -> None:
        sizes.append(world_size)
        connect(self, unique_id, rank, world_size, deadline)

    monkeypatch.setattr(Communicator, "connect", counted)
    with PeerEngine("a") as first, PeerEngine("b") as second, PeerEngine("c") as third:
        for engine, mode in ((first, "staged"), (second, "staged"), (third, "in_place")):
            engine.build(SHAPES, mode=mode, device=DEVICE)
        policy = Policy()
        with Publisher(policy, [first, second, third], transport=PUSH, timeout_s=30) as publisher:
            for _ in range(3):
                policy.step()
                assert publisher.publish().digests_match
                for engine in (first, second, third):
                    assert engine.peer.call("contents") == contents(policy)
    assert sorted(sizes) == [2, 3]


@pytest.mark.parametrize(("transport", "mode"), list(itertools.product((PULL, PUSH), ("in_place", "staged"))))
def test_trainer_and_engine_on_two_gpus(monkeypatch: pytest.MonkeyPatch, transport: str, mode: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    with PeerEngine(shares_gpu=False) as engine:
        monkeypatch.undo()
        engine.build(SHAPES, mode=mode, device=DEVICE)
        policy = Policy()
        with Publisher(policy, [engine], transport=transport, timeout_s=30) as publisher:
            for _ in range(3):
                policy.step()
                report = publisher.publish()
                assert report.digests_match
                assert report.engines[0].workers[0].transport == transport
                assert engine.peer.call("contents") == contents(policy)


@pytest.mark.parametrize("shadows", [1, 2])
def test_tensors_through_the_loader_and_the_way_back(shadows: int) -> None:
    with PeerEngine("a") as first, PeerEngine("b") as second:
        first.build(SHAPES, mode="staged", device=DEVICE, relocatable=False, through_loader=("norm", "wide"))
        second.build(SHAPES, mode="staged", device=DEVICE, relocatable=False)
        policy = Policy()
        with Publisher(policy, [first, second], shadows=shadows, timeout_s=15) as publisher:
            for _ in range(2):
                policy.step()
                assert publisher.publish().digests_match
            before = contents(policy)
            commit, rollback = second.commit, first.rollback
            taken_back = []
            first.rollback = lambda *args: (taken_back.append(1), rollback(*args))[1]  # type: ignore[method-assign]

            def fail(*_: object) -> None:
                raise DigestMismatch("planted")

            second.commit = fail  # type: ignore[assignment, method-assign]
            policy.step()
            with pytest.raises(RoundFailed):
                publisher.publish()
            assert taken_back
            assert first.peer.call("contents") == second.peer.call("contents") == before
            second.commit = commit  # type: ignore[method-assign]
            assert publisher.publish().digests_match
            assert first.peer.call("contents") == second.peer.call("contents") == contents(policy)


def test_a_dead_engine_is_named_and_its_successor_joins() -> None:
    policy = Policy()
    with PeerEngine("a") as engine:
        engine.build(SHAPES, mode="in_place", device=DEVICE)
        with Publisher(policy, [engine], timeout_s=10, silence_s=2.0) as publisher:
            publisher.publish()
            engine.peer.kill()
            with pytest.raises((RoundFailed, OSError)):
                publisher.publish()
    with PeerEngine("a") as successor:
        successor.build(SHAPES, mode="in_place", device=DEVICE)
        with Publisher(policy, [successor], timeout_s=10) as publisher:
            assert publisher.publish().digests_match
            assert successor.peer.call("contents") == contents(policy)


def test_a_trainers_memory_is_free_again_after_close(engine: PeerEngine) -> None:
    if DEVICE != "cuda":
        pytest.skip("counts GPU memory")
    engine.build(SHAPES, mode="in_place", device=DEVICE)
    policy = Policy()
    for _ in range(2):
        with Publisher(policy, [engine], timeout_s=10) as publisher:
            publisher.publish()
        del publisher
    with Publisher(policy, [engine], timeout_s=10, transport=PULL) as publisher:
        policy.step()
        assert publisher.publish().digests_match
        assert engine.peer.call("contents") == contents(policy)
