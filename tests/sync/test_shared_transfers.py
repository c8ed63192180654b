"""Transfers that engines share: who shares with whom, and that one engine's failure is told as that one's alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from tests.support.shared_tcp import SharedEnd, SharingTcp
from torch import nn

from weightcast import Publisher
from weightcast.errors import PeerLost, RoundFailed
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.transports.registry import registry
from weightcast.transports.together import Blamed


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> SharingTcp:
    transport = SharingTcp()
    monkeypatch.setitem(registry()._transports, SharingTcp.name, transport)
    return transport


def weights() -> dict[str, torch.Tensor]:
    return {"a": torch.randn(40, 8), "b": torch.randn(33), "c": torch.randint(0, 99, ())}


@pytest.fixture
def policy() -> nn.Module:
    module = nn.Module()
    for name, value in weights().items():
        module.register_buffer(name, value)
    return module


def step(policy: nn.Module) -> dict[str, torch.Tensor]:
    for name, value in weights().items():
        policy.get_buffer(name).copy_(value)
    return {name: value.clone() for name, value in policy.state_dict().items()}


@pytest.fixture
def make() -> Iterator[Callable[..., LocalEngine]]:
    made: list[LocalEngine] = []

    def new(name: str, mode: str = "staged", num_shards: int = 1, num_replicas: int = 1) -> LocalEngine:
        models = [
            DictModel(weights(), rows=(rank, num_shards)) if num_shards > 1 else DictModel(weights())
            for _ in range(num_replicas)
            for rank in range(num_shards)
        ]
        made.append(LocalEngine(name, models, mode=mode))
        return made[-1]

    yield new
    for engine in made:
        engine.stop()


def publisher_of(policy: nn.Module, engines: Sequence[LocalEngine], **options: object) -> Publisher:
    return Publisher(policy, engines, transport=SharingTcp.name, timeout_s=20, **options)  # type: ignore[arg-type]


def test_staged_engines_share_shard_by_shard_and_an_engine_that_is_added_shares_from_the_next_round_on(
    policy: nn.Module, groups: SharingTcp, make: Callable[..., LocalEngine]
) -> None:
    engines = [make("a", num_shards=2), make("b", num_shards=2, num_replicas=2)]
    with publisher_of(policy, engines) as publisher:
        for _ in range(2):
            values = step(policy)
            assert publisher.publish().digests_match
            assert all(model.holds(values) for engine in engines for model in engine.models)
        assert groups.sizes == [3, 3]
        engines.append(make("c", num_shards=2))
        report = publisher.add(engines[-1])
        assert report is not None
        assert report.number == 2
        assert all(model.holds(values) for model in engines[-1].models)
        assert groups.sizes == [3, 3, 1, 1]
        values = step(policy)
        assert publisher.publish().number == 3
        assert all(model.holds(values) for engine in engines for model in engine.models)
        assert groups.sizes == [3, 3, 1, 1, 4, 4]
        publisher.publish()
        assert groups.sizes == [3, 3, 1, 1, 4, 4]


@pytest.mark.parametrize(
    ("mode", "options", "sizes"),
    [
        ("staged", {"require": "live"}, [1, 2]),
        ("in_place", {}, [1, 1, 1]),
        ("in_place", {"require": "live"}, [1, 1, 1]),
    ],
)
def test_who_must_not_break_with_others_shares_with_none(
    policy: nn.Module,
    groups: SharingTcp,
    make: Callable[..., LocalEngine],
    mode: str,
    options: dict[str, str],
    sizes: list[int],
) -> None:
    engines = [make("a", mode), make("b", mode, num_replicas=2)]
    with publisher_of(policy, engines, **options) as publisher:
        for _ in range(2):
            values = step(policy)
            assert publisher.publish().digests_match
            assert all(model.holds(values) for engine in engines for model in engine.models)
    assert sorted(groups.sizes) == sizes


@pytest.mark.parametrize("guilty", [0, 1, 2])
def test_a_failure_is_told_of_the_engine_that_failed_and_the_next_round_works(
    policy: nn.Module, groups: SharingTcp, make: Callable[..., LocalEngine], guilty: int
) -> None:
    engines = [make(name) for name in "abc"]
    with publisher_of(policy, engines) as publisher:
        before = step(policy)
        first = publisher.publish()
        error = PeerLost("the worker is gone")
        groups.groups[-1][guilty].fault = lambda what: error if what == "send" else None
        step(policy)
        with pytest.raises(RoundFailed) as caught:
            publisher.publish()
        assert {name: type(cause) for name, cause in caught.value.causes.items()} == {"abc"[guilty]: PeerLost}
        assert set(caught.value.serving.values()) == {first.version}
        assert all(engine.models[0].holds(before) for engine in engines)
        values = step(policy)
        assert publisher.publish().digests_match
        assert all(engine.models[0].holds(values) for engine in engines)
        assert groups.sizes == [3, 3]


def test_an_engine_that_cannot_connect_leaves_the_others_connected(
    policy: nn.Module, groups: SharingTcp, make: Callable[..., LocalEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = [make("a"), make("b"), make("c")]

    def planted(self: SharedEnd, what: str) -> None:
        if self.member == 1 and len(self.ends) == 3:
            raise Blamed(1, PeerLost("the worker is gone"))

    monkeypatch.setattr(SharedEnd, "_work", lambda self, what: [planted(end, what) for end in self.ends])
    with publisher_of(policy, engines) as publisher:
        with pytest.raises(PeerLost) as caught:
            publisher.connect()
        assert caught.value.engine == "b"
        assert publisher.members["a"] == publisher.members["c"] == "ready"
        assert groups.sizes == [3, 2]
        monkeypatch.setattr(SharedEnd, "_work", lambda self, what: None)
        values = step(policy)
        assert publisher.publish().digests_match
        assert all(engine.models[0].holds(values) for engine in engines)


def test_an_engine_that_has_to_catch_up_does_it_alone(
    policy: nn.Module, groups: SharingTcp, make: Callable[..., LocalEngine]
) -> None:
    """ "b" comes back with other weights while the source still holds what "a" serves."""
    engines = [make("a"), make("b")]
    with publisher_of(policy, engines) as publisher:
        values = step(policy)
        publisher.publish()
        engines[1].stop()
        engines[1].__init__("b", [DictModel(weights())], mode="staged")  # type: ignore[misc]
        publisher.connect()
        assert engines[1].models[0].holds(values)
        assert engines[1].workers[0].weight_version == engines[0].workers[0].weight_version
        assert groups.sizes[-1] == 1
        values = step(policy)
        assert publisher.publish().number == 2
        assert all(engine.models[0].holds(values) for engine in engines)
        assert groups.sizes[-1] == 2
