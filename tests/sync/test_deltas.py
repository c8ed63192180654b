"""Rounds that send what changed: every live byte is the trainer's, whatever an engine's layout, and any doubt sends all values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from weightcast import Publisher, cpu
from weightcast.delta import coding
from weightcast.errors import InvalidInput, RoundFailed
from weightcast.receiver.staging import Target
from weightcast.report.model import Report, WorkerReport
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.transports import kept, tcp_ends

Tensors = dict[str, torch.Tensor]
DTYPES = (
    torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.int8, torch.int64, torch.bool, torch.complex64,
)  # fmt: skip
INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def random_bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Any bits, those of NaN with all their payloads too."""
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    raw = np.random.default_rng().integers(0, 256, (math.prod(shape) + 1) * dtype.itemsize, np.uint8)
    return torch.from_numpy(raw).view(dtype)[1:].reshape(shape)


def weights() -> Tensors:
    """Of every size of element; two are 4,000 rows of which workers may have a part each."""
    found = {f"t{number}": random_bits(dtype, 40, 25) for number, dtype in enumerate(DTYPES)}
    found["wide"] = (torch.randn(4000, 32) * 0.02).to(torch.bfloat16)
    found["long"] = torch.randn(4000, 24)
    return found


def nbytes_of(tensors: Tensors) -> int:
    return sum(value.nbytes for value in tensors.values())


def step(tensors: Tensors, share: float = 0.02) -> None:
    """What an optimizer does: some values are others, most by a unit of the last place or two, some by any bits, at random places."""
    for value in tensors.values():
        bits = value.view(torch.uint8 if value.dtype == torch.bool else INTS[value.itemsize]).reshape(-1)
        where = torch.rand(bits.shape) < share
        if value.dtype == torch.bool:
            bits[where] ^= 1
            continue
        moves = torch.randint(-2, 3, (int(where.sum()),), dtype=torch.int64).to(bits.dtype)
        bits[where] += moves
        jumps = torch.rand(bits.shape) < share / 20
        bits[jumps] = random_bits(value.dtype, int(jumps.sum())).view(bits.dtype).reshape(-1)


def load_kernels() -> None:
    cpu.kernels_for(cpu.WORTH_NBYTES)
    cpu.changing_for(cpu.WORTH_NBYTES)


@pytest.fixture(params=[pytest.param(True, id="kernels"), pytest.param(False, id="numpy")])
def finder(request: pytest.FixtureRequest) -> Iterator[None]:
    """How changes are found and applied: by kernels, which are for larger models by themselves, or by numpy and torch."""
    if request.param:
        pytest.importorskip("numba")
        # Compiled before the first round, whose time is short.
        load_kernels()
    with patch.object(cpu, "WORTH_NBYTES", 0 if request.param else 2**62):
        yield


@contextmanager
def serving(models: list[DictModel], source: Tensors, **settings: Any) -> Iterator[Publisher]:
    mode = settings.pop("mode", "staged")
    engine = LocalEngine("local", models, mode=mode)
    settings = {"transport": "tcp", "delta": True, "bucket_nbytes": 2**16, "timeout_s": 20} | settings
    try:
        with Publisher(source, [engine], **settings) as publisher:
            yield publisher
    finally:
        engine.stop()


def workers(report: Report) -> list[WorkerReport]:
    assert report.digests_match
    return [worker for engine in report.engines for worker in engine.workers]


def codecs(report: Report) -> set[str]:
    return {worker.codec for worker in workers(report)}


SHAPES: dict[str, tuple[Callable[[Tensors], list[DictModel]], dict[str, Any]]] = {
    "rebound": (lambda some: [DictModel(some)], {}),
    "exchanged": (lambda some: [DictModel(some, relocatable=False)], {}),
    "two shadows": (lambda some: [DictModel(some, relocatable=False)], {"shadows": 2}),
    "in place": (lambda some: [DictModel(some)], {"mode": "in_place"}),
    "two workers": (lambda some: [DictModel(some, rows=(rank, 2)) for rank in range(2)], {}),
    "through the loader": (lambda some: [DictModel(some, through_loader=("wide", "t1"))], {}),
    "in place, through the loader": (lambda some: [DictModel(some, through_loader=("wide",))], {"mode": "in_place"}),
    "tls": (lambda some: [DictModel(some)], {"transport": "tls"}),
    "small buckets": (lambda some: [DictModel(some)], {"bucket_nbytes": 512}),
}


@pytest.mark.usefixtures("finder")
@pytest.mark.parametrize("shape", SHAPES)
def test_rounds_of_changes_bring_every_byte(shape: str) -> None:
    make, settings = SHAPES[shape]
    source = weights()
    models = make({name: torch.zeros_like(value) for name, value in source.items()})
    copied: list[Target] = []
    honest = Target.catch_up

    def catch_up(target: Target) -> None:
        copied.append(target)
        honest(target)

    with patch.object(Target, "catch_up", catch_up), serving(models, source, **settings) as publisher:
        for number in range(6):
            report = publisher.publish()
            assert all(model.holds(source) for model in models), number
            assert codecs(report) == {"delta" if number else "dense"}
            sent = sum(worker.sent_nbytes for worker in workers(report))
            assert sent < report.nbytes / 4 if number else sent >= report.nbytes
            assert report.own_nbytes > 1.9 * nbytes_of(source)  # a mapping is copied as well
            step(source, share=(0.02, 0.0, 0.0005, 0.05, 0.02)[number % 5])
    # Once; from then on a shadow is brought up to date by the changes that it missed.
    assert len(copied) == (0 if settings.get("mode") == "in_place" else len(models))


@pytest.mark.usefixtures("finder")
def test_wider_and_narrower_engines_get_the_cast_of_published_values() -> None:
    source = {"a": torch.randn(300, 40).to(torch.bfloat16), "b": torch.randn(300, 40), "c": torch.randn(300, 40)}
    kinds = {"a": torch.float32, "b": torch.bfloat16, "c": torch.float64}
    model = DictModel({name: torch.zeros(300, 40, dtype=kinds[name]) for name in source})
    with serving([model], source) as publisher:
        for number in range(5):
            assert codecs(publisher.publish()) == {"delta" if number else "dense"}
            assert model.holds(source)
            for value in source.values():
                where = torch.rand(value.shape) < 0.03
                value[where] *= 1 + torch.randn(int(where.sum())).to(value.dtype) * 0.01


@pytest.mark.usefixtures("finder")
def test_tied_landings_get_each_change_once() -> None:
    source = {"embed": torch.randn(200, 50).to(torch.bfloat16)}
    source["head"] = source["embed"]
    model = DictModel({"embed": torch.zeros(200, 50, dtype=torch.bfloat16)}, tied={"head": "embed"})
    with serving([model], source) as publisher:
        for number in range(5):
            assert codecs(publisher.publish()) == {"delta" if number else "dense"}
            assert model.holds({"embed": source["embed"]})
            step({"embed": source["embed"]})


@pytest.mark.usefixtures("finder")
def test_an_engine_that_comes_later_gets_all_values_and_then_changes() -> None:
    source = weights()
    first, second = (DictModel({name: torch.zeros_like(v) for name, v in source.items()}) for _ in range(2))
    late = LocalEngine("late", [second], mode="staged")
    with serving([first], source) as publisher:
        publisher.publish()
        step(source)
        publisher.publish()
        publisher.add(late)
        for number in range(4):
            step(source)
            report = publisher.publish()
            assert first.holds(source)
            assert second.holds(source)
            by_name = {engine.name: engine.workers[0].codec for engine in report.engines}
            assert by_name["late"] == "delta", number  # ``add`` has brought it what the other one serves
        assert by_name == {"local": "delta", "late": "delta"}
    late.stop()


@pytest.mark.usefixtures("finder")
def test_a_round_that_fails_is_followed_by_all_values() -> None:
    source = weights()
    model = DictModel({name: torch.zeros_like(value) for name, value in source.items()})
    engine = LocalEngine("local", [model], mode="staged")
    with Publisher(source, [engine], transport="tcp", delta=True, timeout_s=20) as publisher:
        for _ in range(3):
            publisher.publish()
            step(source)
        served = {name: value.clone() for name, value in model.parameters().items()}
        engine.refuse("commit")
        with pytest.raises(RoundFailed):
            publisher.publish()
        assert model.holds(served)
        engine.refuse()
        for codec in ("dense", "delta", "delta"):
            step(source)
            assert codecs(publisher.publish()) == {codec}
            assert model.holds(source)
    engine.stop()


def _flipped(data: bytes) -> bytes:
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]


def _of_other_places(data: bytes) -> bytes:
    """Changes that can be read, at other places than they belong to."""
    import zstandard

    head, body = data[:12], bytearray(zstandard.ZstdDecompressor().decompress(data[12:]))
    body[0] ^= 1
    return head + zstandard.ZstdCompressor(level=1).compress(bytes(body))


@pytest.mark.usefixtures("finder")
@pytest.mark.parametrize("harm", [_flipped, lambda data: data[:-3], lambda data: b"", _of_other_places])
@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_harmed_changes_never_count_as_live(harm: Callable[[bytes], bytes], mode: str) -> None:
    source = {"w": (torch.randn(500, 400) * 0.02).to(torch.bfloat16)}
    model = DictModel({"w": torch.zeros(500, 400, dtype=torch.bfloat16)})
    with serving([model], source, mode=mode) as publisher:
        publisher.publish()
        step(source)
        publisher.publish()
        served = {"w": source["w"].clone()}
        step(source)
        honest = coding.encode

        def harmed(*given: Any) -> bytes | None:
            data = honest(*given)
            return None if data is None else harm(data)

        with patch.object(kept, "encode", harmed), pytest.raises(RoundFailed) as caught:
            publisher.publish()
        if mode == "staged":
            assert model.holds(served)
        else:
            assert caught.value.dirty == ("local",) or model.holds(served)
        assert codecs(publisher.publish()) == {"dense"}
        assert model.holds(source)
        step(source)
        assert codecs(publisher.publish()) == {"delta"}
        assert model.holds(source)


@pytest.mark.usefixtures("finder")
def test_changes_of_an_earlier_round_are_not_taken_for_the_present_ones() -> None:
    """Replayed: what the trainer sends in round 4 are the changes of round 3, under the headers of round 4."""
    source = {"w": (torch.randn(500, 400) * 0.02).to(torch.bfloat16)}
    model = DictModel({"w": torch.zeros(500, 400, dtype=torch.bfloat16)})
    sent: list[Any] = []
    honest = tcp_ends.KeptBuckets.take

    def remembering(self: Any, bucket: int, number: int, fresh: Any) -> Any:
        sent.append(honest(self, bucket, number, fresh))
        return sent[-1]

    with serving([model], source, bucket_nbytes=2**20) as publisher:
        publisher.publish()
        step(source)
        with patch.object(tcp_ends.KeptBuckets, "take", remembering):
            publisher.publish()
        served = {"w": source["w"].clone()}
        step(source)

        def replaying(self: Any, bucket: int, number: int, fresh: Any) -> Any:
            now = honest(self, bucket, number, fresh)
            return now._replace(data=sent[0].data)

        with (
            patch.object(tcp_ends.KeptBuckets, "take", replaying),
            pytest.raises(RoundFailed, match=r"digest|round before"),
        ):
            publisher.publish()
        assert model.holds(served)
        publisher.publish()
        assert model.holds(source)


@pytest.mark.usefixtures("finder")
@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_changes_of_other_buckets_are_not_taken_for_those_of_one(mode: str) -> None:
    """Reordered: each two buckets of one form are sent each other's changes, under the right headers."""
    source = {"w": (torch.randn(510, 384) * 0.02).to(torch.bfloat16)}
    model = DictModel({"w": torch.zeros(510, 384, dtype=torch.bfloat16)})
    take, send = tcp_ends.KeptBuckets.take, tcp_ends.TcpTrainerEnd.send_kept

    def another(self: Any, bucket: int, number: int, fresh: Any) -> Any:
        return take(self, bucket ^ 1, number, fresh)

    def reordering(self: Any, number: int, deadline: Any, *, changes: bool) -> int:
        self.look(number, deadline)
        with patch.object(tcp_ends.KeptBuckets, "take", another):
            return send(self, number, deadline, changes=changes)

    with serving([model], source, mode=mode) as publisher:
        for _ in range(3):
            publisher.publish()
            served = {"w": source["w"].clone()}
            step(source)
        with patch.object(tcp_ends.TcpTrainerEnd, "send_kept", reordering), pytest.raises(RoundFailed):
            publisher.publish()
        if mode == "staged":
            assert model.holds(served)
        assert codecs(publisher.publish()) == {"dense"}
        assert model.holds(source)


def test_a_round_in_which_everything_changes_is_no_longer_than_all_values() -> None:
    source = {"w": random_bits(torch.bfloat16, 300, 512)}
    model = DictModel({"w": torch.zeros(300, 512, dtype=torch.bfloat16)})
    reason = "the worker holds nothing that changes could be told against"
    with serving([model], source) as publisher:
        for _ in range(3):
            (worker,) = workers(publisher.publish())
            assert worker.sent_nbytes <= worker.nbytes * 1.01
            assert worker.codec == "dense"
            assert worker.codec_reason == reason
            reason = "the changes are no shorter than all values"
            assert model.holds(source)
            source["w"].copy_(random_bits(torch.bfloat16, 300, 512))


def test_without_being_asked_for_nothing_is_kept() -> None:
    source = weights()
    model = DictModel({name: torch.zeros_like(value) for name, value in source.items()})
    for delta, transport in ((False, "tcp"), (True, "shm")):
        with serving([model], source, delta=delta, transport=transport) as publisher:
            for _ in range(3):
                (worker,) = workers(report := publisher.publish())
                assert worker.codec == "dense"
                assert report.own_nbytes < 1.1 * nbytes_of(source)
                assert worker.codec_reason == ("shm brings all values" if delta else "")
                step(source)
                assert not model.holds(source)


@pytest.mark.parametrize("wish", ["always", 1.5, None])
def test_other_wishes_are_refused(wish: Any) -> None:
    with pytest.raises(InvalidInput, match='delta is True, False or "auto"'):
        Publisher({"w": torch.zeros(2)}, delta=wish)
