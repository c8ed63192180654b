"""Publisher and Receiver together: every byte on the workers equals the trainer's, round after round, in every mode."""

import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import nn

from weightcast import Publisher
from weightcast.content.expected import ExpectedDigest
from weightcast.errors import DeadlineExceeded, DigestMismatch, RoundFailed, StateError, TransportError, WeightcastError
from weightcast.layout.memory import Memory
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.trainer.fleet.round_book import Cancelled


class Policy(nn.Module):
    """Odd sizes, a tied weight and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(33, 20)
        self.layers = nn.ModuleList(nn.Linear(20, 20, bias=i % 2 == 0) for i in range(4))
        self.norm = nn.LayerNorm(20)
        self.head = nn.Linear(20, 33, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.randint(1, 9, (), dtype=torch.int64))


def randomise(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def fresh(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.randint(0, 100, value.shape).to(value.dtype) for name, value in module.state_dict().items()}


@pytest.fixture
def policy() -> Policy:
    return Policy()


@pytest.fixture
def engines(policy: Policy) -> Iterator[dict[str, LocalEngine]]:
    made: dict[str, LocalEngine] = {}
    yield made
    for engine in made.values():
        engine.stop()


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("mode", ["staged", "in_place"])
@pytest.mark.parametrize("kind", ["whole", "sharded", "loader", "fixed"])
def test_every_byte_arrives(
    policy: Policy, engines: dict[str, LocalEngine], transport: str, mode: str, kind: str
) -> None:
    models = {
        "whole": lambda: [DictModel(fresh(policy))],
        "sharded": lambda: [DictModel(fresh(policy), rows=(rank, 2)) for rank in range(2)],
        "loader": lambda: [DictModel(fresh(policy), through_loader=("norm.weight", "layers.0.weight"))],
        "fixed": lambda: [DictModel(fresh(policy), relocatable=False)],
    }[kind]()
    engines["a"] = engine = LocalEngine("a", models)
    with Publisher(policy, [engine], transport=transport, mode=mode, timeout_s=30) as publisher:
        publisher.connect()
        for number in (1, 2, 3):
            randomise(policy)
            before = time.time()
            report = publisher.publish()
            assert report.number == number
            assert before <= (report.at or 0) <= time.time()
            assert report.digests_match
            assert report.mode == mode
            assert {w.transport for e in report.engines for w in e.workers} == {transport}
            assert all(model.holds(state(policy)) for model in models)
            assert all(worker.weight_version == report.version for worker in engine.workers)


def test_training_goes_on_after_the_parameters_moved(policy: Policy, engines: dict[str, LocalEngine]) -> None:
    engines["a"] = engine = LocalEngine("a", [DictModel(fresh(policy))])
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1)
    with Publisher(policy, [engine], transport="shm", timeout_s=30) as publisher:
        publisher.connect()
        for _ in range(3):
            optimizer.zero_grad()
            policy.head(policy.norm(policy.layers[0](policy.embed(torch.arange(5))))).square().sum().backward()
            optimizer.step()
            publisher.publish()
            assert engine.models[0].holds(state(policy))
        assert policy.head.weight.data_ptr() == policy.embed.weight.data_ptr()
    optimizer.step()


def half(policy: Policy) -> None:
    policy.norm.weight.data = torch.randn(20).half()


def replace(policy: Policy) -> None:
    policy.layers[1].weight = nn.Parameter(torch.randn(20, 20))


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("mode", ["staged", "in_place"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (half, "parameters of the module were moved since connect"),
        (replace, r"'layers.1.weight' of the module was replaced by another tensor since connect"),
    ],
)
def test_a_source_that_changed_ends_the_round_before_anybody_commits(
    policy: Policy,
    engines: dict[str, LocalEngine],
    transport: str,
    mode: str,
    change: Callable[[Policy], None],
    message: str,
) -> None:
    made = [LocalEngine(name, [DictModel(fresh(policy), relocatable=False)]) for name in ("a", "b")]
    engines |= {engine.name: engine for engine in made}
    commits: list[str] = []
    for engine in made:
        engine.before = commits.append
    with Publisher(policy, made, transport=transport, mode=mode, timeout_s=30) as publisher:
        randomise(policy)
        version, before = publisher.publish().version, state(policy)
        weights, layer = policy.norm.weight.data, policy.layers[1].weight
        randomise(policy)
        change(policy)
        commits.clear()
        for _ in range(2):
            with pytest.raises(StateError, match=message):
                publisher.publish()
        assert "commit" not in commits
        for engine in made:
            assert engine.models[0].holds(before)
            assert {(worker.weight_version, worker.dirty) for worker in engine.workers} == {(version, False)}
        assert set(publisher.versions.values()) == {version}

        policy.norm.weight.data, policy.layers[1].weight = weights, layer
        randomise(policy)
        assert publisher.publish().number == 2
        assert all(engine.models[0].holds(state(policy)) for engine in made)


def test_fp32_masters_reach_a_bf16_worker(policy: Policy, engines: dict[str, LocalEngine]) -> None:
    half = {n: v.to(torch.bfloat16) if v.is_floating_point() else v for n, v in fresh(policy).items()}
    for i, transport in enumerate(("shm", "tcp")):
        engines[transport] = engine = LocalEngine(f"e{i}", [DictModel(half)])
        with Publisher(policy, [engine], transport=transport, timeout_s=30) as publisher:
            randomise(policy)
            assert publisher.publish().digests_match
            assert engine.models[0].holds(state(policy))


def test_a_state_dict_and_several_engines(policy: Policy, engines: dict[str, LocalEngine]) -> None:
    tensors = fresh(policy)
    for name in ("a", "b"):
        engines[name] = LocalEngine(name, [DictModel(fresh(policy))])
    with Publisher(tensors, list(engines.values()), timeout_s=30) as publisher:
        for _ in range(2):
            for name, value in fresh(policy).items():
                tensors[name] = value
            assert publisher.publish().digests_match
            assert all(engine.models[0].holds(tensors) for engine in engines.values())


def test_corrupted_bytes_abort_a_staged_round_and_the_next_one_works(
    policy: Policy, engines: dict[str, LocalEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engines["a"] = engine = LocalEngine("a", [DictModel(fresh(policy))], mode="staged")
    with Publisher(policy, [engine], timeout_s=30) as publisher:
        publisher.publish()
        before = state(policy)
        session = engine.workers[0].receiver._session
        assert session is not None
        receive = session.receive

        def corrupt(id, memory, deadline):  # type: ignore[no-untyped-def]
            result = receive(id, memory, deadline)
            memory.storages[0][7] ^= 1
            return result

        monkeypatch.setattr(session, "receive", corrupt)
        randomise(policy)
        with pytest.raises(RoundFailed) as caught:
            publisher.publish()
        assert isinstance(caught.value.causes["a"], DigestMismatch)
        assert caught.value.dirty == ()
        assert caught.value.serving["a"].startswith("1-")
        assert engine.models[0].holds(before)
        monkeypatch.setattr(session, "receive", receive)
        assert publisher.publish().number == 2
        assert engine.models[0].holds(state(policy))


class Endless:
    """Stands in for a digest of more bytes than there is time for; says how it ended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ended: list[BaseException] = []
        monkeypatch.setattr(ExpectedDigest, "of", self.of)
        monkeypatch.setattr(ExpectedDigest, "start", lambda digest, memory, check: partial(self.of, memory, check))

    def of(self, memory: Memory, check: Callable[[], None]) -> int:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            time.sleep(0.01)
            try:
                check()
            except WeightcastError as error:
                self.ended.append(error)
                raise
        raise AssertionError("nobody ended it")


@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_the_trainers_own_digest_ends_by_the_deadline(
    policy: Policy, engines: dict[str, LocalEngine], monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    engines["a"] = engine = LocalEngine("a", [DictModel(fresh(policy))])
    with Publisher(policy, [engine], mode=mode, timeout_s=30) as publisher:
        first = publisher.publish()
        before = state(policy)
        randomise(policy)
        with monkeypatch.context() as patch:
            endless = Endless(patch)
            with pytest.raises(RoundFailed) as caught:
                publisher.publish(timeout_s=3.0)
        (error,) = endless.ended
        assert isinstance(error, DeadlineExceeded)
        assert caught.value.causes == {"trainer": error}
        assert (caught.value.serving, caught.value.dirty) == ({"a": first.version}, ())
        assert engine.models[0].holds(before)
        assert publisher.publish().digests_match
        assert engine.models[0].holds(state(policy))


def test_the_trainers_own_digest_ends_when_the_round_has_failed(
    policy: Policy, engines: dict[str, LocalEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        engines[name] = LocalEngine(name, [DictModel(fresh(policy))], mode="staged")
    with Publisher(policy, list(engines.values()), timeout_s=50) as publisher:
        publisher.publish()

        def fail(*_: object) -> None:
            raise TransportError("no bytes today")

        with monkeypatch.context() as patch:
            endless = Endless(patch)
            patch.setattr(engines["b"].workers[0].receiver._session, "receive", fail)
            with pytest.raises(RoundFailed) as caught:
                publisher.publish()
        assert set(caught.value.causes) == {"b"}
        (error,) = endless.ended
        assert isinstance(error, Cancelled)
        assert publisher.publish().digests_match


def test_a_commit_that_fails_on_one_engine_rolls_the_other_back(
    policy: Policy, engines: dict[str, LocalEngine]
) -> None:
    for name in ("a", "b"):
        engines[name] = LocalEngine(name, [DictModel(fresh(policy))], mode="staged")
    with Publisher(policy, list(engines.values()), timeout_s=30) as publisher:
        first = publisher.publish()
        before = state(policy)

        def fail(phase: str) -> None:
            if phase == "commit":
                raise StateError("no commit today")

        engines["b"].before = fail
        randomise(policy)
        with pytest.raises(RoundFailed, match="no commit today") as caught:
            publisher.publish()
        assert set(caught.value.serving.values()) == {first.version}
        for engine in engines.values():
            assert engine.models[0].holds(before)
            assert engine.workers[0].weight_version == first.version
        engines["b"].before = lambda phase: None
        assert publisher.publish().digests_match
        assert all(engine.models[0].holds(state(policy)) for engine in engines.values())


def test_a_loader_that_raises_half_way_leaves_version_n(policy: Policy, engines: dict[str, LocalEngine]) -> None:
    through = ("norm.weight", "layers.0.weight", "layers.1.weight")
    model = DictModel(fresh(policy), through_loader=through)
    engines["a"] = engine = LocalEngine("a", [model], mode="staged")
    with Publisher(policy, [engine], timeout_s=30) as publisher:
        for _ in range(2):
            randomise(policy)
            publisher.publish()
            before = state(policy)
            model.fail_load = ValueError("the loader stumbled")
            randomise(policy)
            with pytest.raises(RoundFailed, match="the loader stumbled"):
                publisher.publish()
            assert model.holds(before)
            assert not engine.workers[0].dirty


def test_a_second_trainer_is_refused_unless_it_takes_over(policy: Policy, engines: dict[str, LocalEngine]) -> None:
    engines["a"] = engine = LocalEngine("a", [DictModel(fresh(policy))])
    with Publisher(policy, [engine], timeout_s=30) as first:
        first.publish()
        with Publisher(policy, [engine], timeout_s=5) as second, pytest.raises(StateError, match="another trainer"):
            second.connect()
        assert first.publish().number == 2
        with Publisher(policy, [engine], timeout_s=30, takeover=True) as third:
            assert third.publish().number == 3
    with Publisher(policy, [engine], timeout_s=30) as fourth:
        assert fourth.publish().number == 4
