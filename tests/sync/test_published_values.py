"""What is live is cast(engine's type, cast(published type, given value)), whatever the source, the way and the engine.

Expected values are computed by plain torch and compared with live tensors byte for byte; digests are compared besides.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from weightcast import Publisher, cpu
from weightcast.errors import InvalidInput
from weightcast.plan import replay
from weightcast.sources import SourceLike
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.transports.files import CHECKPOINT_ROOT

TYPES = (torch.float32, torch.bfloat16, torch.float16)
LOADED = ("norm.weight", "head.weight")
TIMEOUT_S = 30.0


class Policy(nn.Module):
    """float32 masters, one of them larger than a block between two casts, transposed and tied ones, half-precision values, an integer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(62, 60)
        self.tied = nn.Linear(60, 62, bias=False)
        self.tied.weight = self.embed.weight
        self.router = nn.Linear(20, 8)
        self.norm = nn.LayerNorm(20)
        self.head = nn.Linear(20, 32, bias=False)
        self.turned = nn.Parameter(torch.empty(24, 18).T)
        self.register_buffer("small", torch.empty(6, 5, dtype=torch.float16))
        self.register_buffer("brief", torch.empty(4, 7, dtype=torch.bfloat16))
        self.register_buffer("steps", torch.zeros(3, dtype=torch.int64))
        randomise(self)


def randomise(module: nn.Module) -> None:
    with torch.no_grad():
        for value in [*module.parameters(), *module.buffers()]:
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape) * 3)
            else:
                value.copy_(torch.randint(-1000, 1000, value.shape))


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def cast_to(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    return {n: v.to(dtype) if dtype is not None and v.is_floating_point() else v.clone() for n, v in tensors.items()}


def zeros(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(value) for name, value in cast_to(tensors, dtype).items()}


def mixed(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An engine in bfloat16 that keeps its router in float32."""
    brief = zeros(tensors, torch.bfloat16)
    return brief | {name: torch.zeros_like(tensors[name]) for name in ("router.weight", "router.bias")}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block between two casts is a quarter of the largest tensor."""
    monkeypatch.setattr(replay, "CPU_BLOCK_NBYTES", 2**12)


@pytest.fixture
def engines() -> Iterator[Callable[..., LocalEngine]]:
    made: list[LocalEngine] = []

    def make(models: list[DictModel]) -> LocalEngine:
        made.append(LocalEngine(f"e{len(made)}", models))
        return made[-1]

    yield make
    for engine in made:
        engine.stop()


def a_fleet(make: Callable[..., LocalEngine], tensors: Mapping[str, torch.Tensor]) -> list[LocalEngine]:
    """Engines of every type: whole, sliced over two workers, with parameters that may not move, partly through a loader."""
    fleet = [make([DictModel(mixed(tensors))])]
    for dtype in TYPES:
        like = zeros(tensors, dtype)
        fleet.append(make([DictModel(like, relocatable=False)]))
        fleet.append(make([DictModel(like, rows=(rank, 2)) for rank in range(2)]))
        fleet.append(make([DictModel(like, through_loader=LOADED)]))
    return fleet


def check(fleet: list[LocalEngine], published: Mapping[str, torch.Tensor]) -> None:
    """Every live byte is that of the published value, cast to the type that it has there."""
    for engine in fleet:
        for model in engine.models:
            assert set(model.parameters()) == set(published)
            assert model.holds(published)


# A half of all cases: every four of the five have all their values together. Each case has ten engines.
@pytest.mark.parametrize(
    ("kind", "dtype", "transport", "mode", "fused"),
    [
        pytest.param(
            kind,
            dtype,
            transport,
            mode,
            fused,
            id=f"{kind}-{dtype}-{transport}-{mode}-{'kernels' if fused else 'torch'}",
        )
        for (a, kind), (b, dtype), (c, transport), (d, mode), (e, fused) in itertools.product(
            enumerate(["module", "state dict"]),
            enumerate([None, *TYPES]),
            enumerate(["shm", "tcp"]),
            enumerate(["staged", "in_place"]),
            enumerate([False, True]),
        )
        if (a + b + c + d + e) % 2 == 0
    ],
)
def test_what_is_live_is_the_published_value_in_the_engines_type(
    kind: str,
    dtype: torch.dtype | None,
    transport: str,
    mode: str,
    fused: bool,
    engines: Callable[..., LocalEngine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if fused:
        pytest.importorskip("numba")
        monkeypatch.setattr(cpu, "WORTH_NBYTES", 0)
    policy = Policy()
    given = state(policy)
    fleet = a_fleet(engines, given)
    source: SourceLike = policy if kind == "module" else given
    with Publisher(source, fleet, dtype=dtype, transport=transport, mode=mode, timeout_s=TIMEOUT_S) as publisher:
        for number in (1, 2, 3):
            randomise(policy)
            given.update(state(policy))
            report = publisher.publish()
            assert (report.number, report.digests_match) == (number, True)
            assert {worker.transport for engine in report.engines for worker in engine.workers} == {transport}
            check(fleet, cast_to(given, dtype))
        # Nothing of the user's changed.
        assert all(torch.equal(value, given[name]) for name, value in state(policy).items())


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_checkpoint_folder_is_published_as_it_is(
    transport: str, engines: Callable[..., LocalEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CHECKPOINT_ROOT, str(tmp_path))
    policy = Policy()
    fleet = a_fleet(engines, state(policy))
    for number, dtype in enumerate((*TYPES, None), start=1):
        randomise(policy)
        saved = cast_to(state(policy), dtype)
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file({name: value.contiguous() for name, value in saved.items()}, folder / "model.safetensors")
        with Publisher(folder, fleet, transport=transport, timeout_s=TIMEOUT_S) as publisher:
            assert publisher.publish().digests_match
        check(fleet, saved)


def test_one_content_has_one_digest_and_one_name(engines: Callable[..., LocalEngine], tmp_path: Path) -> None:
    """As a module, as a mapping in any order, in whatever memory, in files; another content has another one."""
    policy = Policy()
    for dtype in (None, torch.bfloat16):
        randomise(policy)
        given = state(policy)
        folder = tmp_path / str(dtype)
        folder.mkdir()
        saved = {name: value.contiguous() for name, value in cast_to(given, dtype).items()}
        half = len(saved) // 2
        save_file(dict(list(saved.items())[half:]), folder / "a.safetensors")
        save_file(dict(list(saved.items())[:half]), folder / "b.safetensors")
        given_types: list[tuple[SourceLike, torch.dtype | None]] = [
            (policy, dtype),
            (given, dtype),
            (dict(reversed(given.items())), dtype),
            (cast_to(given, dtype), None),
            (Renamed(saved), None),
            (folder, None),
        ]
        told = []
        for source, wanted in given_types:
            engine = engines([DictModel(zeros(given, torch.float32))])
            with Publisher(source, [engine], dtype=wanted, timeout_s=TIMEOUT_S) as publisher:
                report = publisher.publish()
            told.append((report.version, report.digest, engine.workers[0].weight_version, engine.workers[0].digest))
        assert len(set(told)) == 1, told
        changed = given | {"norm.bias": given["norm.bias"] + 1}
        with Publisher(changed, [engine], dtype=dtype, timeout_s=TIMEOUT_S) as publisher:
            assert publisher.publish().digest != report.digest


class Renamed(nn.Module):
    """The same tensors as buffers of another module, registered from last to first."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        for name, value in reversed(tensors.items()):
            path, _, leaf = name.rpartition(".")
            owner = self
            for part in filter(None, path.split(".")):
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = cast(Renamed, getattr(owner, part))
            owner.register_buffer(leaf, value.clone())


@pytest.mark.parametrize("kind", ["module", "state dict"])
@pytest.mark.parametrize(
    ("dtype", "message", "hint"),
    [
        (torch.int8, r"floating-point type of torch, not torch\.int8", r"torch\.bfloat16"),
        (torch.bool, r"not torch\.bool", r"torch\.bfloat16"),
        (torch.complex64, r"not torch\.complex64", r"torch\.bfloat16"),
        ("bfloat16", "not 'bfloat16'", r"torch\.bfloat16"),
        (16, "not 16", r"torch\.bfloat16"),
        (torch.float8_e4m3fn, r"float8_e4m3fn mean nothing without scales", "Leave dtype out"),
        (torch.float8_e5m2, r"float8_e5m2 mean nothing without scales", "Leave dtype out"),
    ],
)
def test_a_dtype_that_values_cannot_be_cast_to_is_refused(
    kind: str, dtype: object, message: str, hint: str, engines: Callable[..., LocalEngine]
) -> None:
    policy = Policy()
    before, places = state(policy), [value.data_ptr() for value in policy.parameters()]
    engine = engines([DictModel(zeros(before, torch.float32))])
    source: SourceLike = policy if kind == "module" else before
    with pytest.raises(InvalidInput, match=message) as caught:
        Publisher(source, [engine], dtype=cast(torch.dtype, dtype))
    assert caught.value.field == "dtype"
    assert re.search(hint, caught.value.hint or "")
    assert [value.data_ptr() for value in policy.parameters()] == places
    with Publisher(source, [engine], timeout_s=TIMEOUT_S) as publisher:
        publisher.publish()
    check([engine], before)


def test_quantised_values_keep_their_type_beside_a_dtype(engines: Callable[..., LocalEngine]) -> None:
    """A cast of float8 values alone would part them from their scales."""
    for _ in range(2):
        given = {"w": torch.randn(8, 6).to(torch.float8_e4m3fn), "v": torch.randn(9)}
        engine = engines([DictModel({"w": torch.zeros_like(given["w"]), "v": torch.zeros(9)})])
        with Publisher(given, [engine], dtype=torch.bfloat16, timeout_s=TIMEOUT_S) as publisher:
            publisher.publish()
        check([engine], given | {"v": given["v"].bfloat16()})


@pytest.mark.parametrize("kind", ["module", "state dict"])
def test_connect_says_once_where_engines_could_hold_more_than_is_published(
    kind: str, engines: Callable[..., LocalEngine], caplog: pytest.LogCaptureFixture
) -> None:
    policy = Policy()
    given = state(policy)
    source: SourceLike = policy if kind == "module" else given

    def said(dtype: torch.dtype | None, *models: DictModel) -> list[str]:
        caplog.clear()
        with (
            caplog.at_level(logging.INFO, logger="weightcast"),
            Publisher(source, [engines([model]) for model in models], dtype=dtype, timeout_s=TIMEOUT_S) as publisher,
        ):
            publisher.connect()
            publisher.connect()
            publisher.publish()
        return [record.getMessage() for record in caplog.records if "wider than dtype" in record.getMessage()]

    wide, brief = DictModel(zeros(given, torch.float32)), DictModel(zeros(given, torch.bfloat16))
    some = DictModel(mixed(given))
    (told,) = said(torch.bfloat16, brief, some, wide)
    assert re.search(r"keeps 2 of \d+ tensors wider than dtype=bfloat16 \('router.bias' in float32\)", told)
    assert not said(None, DictModel(mixed(given)))
    assert not said(torch.bfloat16, DictModel(zeros(given, torch.bfloat16)))
    assert not said(torch.float32, DictModel(mixed(given)))
