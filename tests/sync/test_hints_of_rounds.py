"""Hints about engines and rounds: the mistake, the hint, and the hint followed."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import zmq
from tests.support.mistakes import Mistake

from weightcast import Publisher
from weightcast.control import Coordinator, JoinInfo
from weightcast.control.coordinator import Member
from weightcast.deadline import Deadline
from weightcast.errors import (
    AuthError,
    DeadlineExceeded,
    GroupBroken,
    InvalidInput,
    LoadError,
    PeerLost,
    PlanMismatch,
    RoundFailed,
    StateError,
    Unsupported,
    WakeFailed,
    WeightcastError,
    hint_of,
)
from weightcast.facts import Facts
from weightcast.manifest import Manifest, TensorSpec
from weightcast.messages import Hello, Welcome
from weightcast.receiver.greeting import Greeting, Identity
from weightcast.testing.local_engine import DictModel, LocalEngine

FACTS = Facts(host="h", pid=os.getpid(), device="cpu")
IDENTITY = Identity(rank=0, world_size=1, facts=FACTS, version="default", digest="", dirty=False, highest=0)


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return {"w": torch.randn(6, 4), "v": torch.randn(3)}


@pytest.fixture
def engine(weights: dict[str, torch.Tensor]) -> Iterator[LocalEngine]:
    made = LocalEngine("e", [DictModel({name: torch.zeros_like(value) for name, value in weights.items()})])
    yield made
    made.stop()


def _publishes(engine: LocalEngine, weights: dict[str, torch.Tensor], **settings: Any) -> Callable[[], None]:
    """A publisher of its own brings fresh values."""

    def publish() -> None:
        for value in weights.values():
            value.copy_(torch.randn_like(value))
        with Publisher(weights, [engine], timeout_s=20, **settings) as publisher:
            assert publisher.publish().digests_match
        assert engine.models[0].holds(weights)

    return publish


def test_another_trainer(engine: LocalEngine, weights: dict[str, torch.Tensor]) -> None:
    with Publisher(weights, [engine], timeout_s=20) as first, Publisher(weights, [engine], timeout_s=20) as second:
        first.publish()
        Mistake(
            make=second.publish, error=StateError, said="another trainer publishes to this engine",
            hint="Close it, or join with takeover", follow=_publishes(engine, weights, takeover=True),
        ).play()  # fmt: skip
    with Publisher(weights, [engine], timeout_s=20) as second:
        second.publish()


def test_calls_of_a_worker_out_of_order(engine: LocalEngine, weights: dict[str, torch.Tensor]) -> None:
    (worker,) = engine.workers
    Mistake(
        make=worker.start_weight_update, error=StateError, said="no trainer is connected",
        hint="Call init_weight_transfer_engine first", follow=_publishes(engine, weights),
    ).play()  # fmt: skip
    update = worker.parse_update_info({"action": "commit", "epoch": 1, "round": 1, "version": "1-a", "timeout_s": 1.0})
    with Publisher(weights, [engine], timeout_s=20) as publisher:
        publisher.publish()
        for call in (worker.finish_weight_update, lambda: worker.update_weights(update)):
            Mistake(
                make=call, error=StateError, said="no weight update is open", hint="Call start_weight_update first"
            ).play()
        worker.start_weight_update()
        Mistake(
            make=worker.start_weight_update,
            error=StateError,
            said="open already",
            hint="Call finish_weight_update first",
        ).play()
        Mistake(
            make=worker.finish_weight_update, error=StateError, said="no update was carried out in this round; it is closed",
            hint="Call update_weights between start_weight_update and finish_weight_update",
            follow=publisher.publish,
        ).play()  # fmt: skip


def test_an_engine_that_never_sleeps(engine: LocalEngine, weights: dict[str, torch.Tensor]) -> None:
    with Publisher(weights, [engine], timeout_s=20) as publisher:
        publisher.publish()
        with pytest.raises((Unsupported, WakeFailed, RoundFailed), match=r"cannot sleep.*Publish without wake="):
            publisher.publish(wake=True)
        assert publisher.publish().digests_match


def test_a_model_of_another_kind(engine: LocalEngine, weights: dict[str, torch.Tensor]) -> None:
    more = {**weights, "head": torch.randn(2)}
    with Publisher(more, [engine], timeout_s=20) as publisher:
        Mistake(
            make=publisher.connect, error=PlanMismatch, said="no place for 1 of 3 published tensors",
            hint=r'unused=\["head"\]', follow=_publishes(engine, weights),
        ).play()  # fmt: skip
    with Publisher(more, [engine], timeout_s=20, unused=["head"]) as publisher:
        assert publisher.publish().unused == ("head",)
    Mistake(
        make=lambda: Publisher(weights, [engine], unused=["haed"]), error=InvalidInput, said="'haed' matches none of the 2",
        hint="Leave out what matches nothing", follow=_publishes(engine, weights),
    ).play()  # fmt: skip


def test_models_of_another_kind_are_told_what_to_do_and_not_to_try_again(weights: dict[str, torch.Tensor]) -> None:
    engines = [LocalEngine(name, [DictModel({k: torch.zeros_like(v) for k, v in weights.items()})]) for name in "ab"]
    more = {**weights, "head": torch.randn(2)}
    try:
        with Publisher(more, engines, timeout_s=20) as publisher:
            for call in (publisher.connect, publisher.publish):
                with pytest.raises(RoundFailed) as caught:
                    call()
                assert {type(cause) for cause in caught.value.causes.values()} == {PlanMismatch}
                assert 'unused=["head"]' in str(caught.value.hint)
                assert "publish() again" not in str(caught.value)
    finally:
        for engine in engines:
            engine.stop()


@pytest.mark.parametrize(
    ("causes", "hint"),
    [
        ([PlanMismatch("no", hint="Tie them")], "Tie them"),
        ([PlanMismatch("no", hint="Tie them"), Unsupported("no", hint="Leave it"), GroupBroken("no")], "Tie them. Leave it"),
        ([InvalidInput("no", hint="Tie them"), PeerLost("gone")], "again"),
        ([GroupBroken("no")], "again"),
        ([], "again"),
    ],
)  # fmt: skip
def test_only_where_no_cause_ends_by_itself_is_a_round_not_tried_again(
    causes: list[WeightcastError], hint: str
) -> None:
    assert hint_of({str(number): cause for number, cause in enumerate(causes)}, "again") == hint


def test_a_loader_that_raises(weights: dict[str, torch.Tensor]) -> None:
    model = DictModel({name: torch.zeros_like(value) for name, value in weights.items()}, through_loader=("v",))
    engine = LocalEngine("e", [model])
    model.fail_load = ValueError("v has another form")
    try:
        with Publisher(weights, [engine], timeout_s=20) as publisher:
            with pytest.raises(WeightcastError) as caught:
                publisher.publish()
            causes = getattr(caught.value, "causes", {"e": caught.value})
            assert isinstance(causes["e"], LoadError)
            assert "See what the engine's loader says of that tensor" in str(causes["e"])
            assert "v has another form" in str(causes["e"])
            model.fail_load = None
            assert publisher.publish().digests_match
            assert model.holds(weights)
    finally:
        engine.stop()


# -- who meets whom


@pytest.fixture
def coordinator() -> Iterator[Coordinator]:
    made = Coordinator()
    manifest = Manifest.of([TensorSpec(name="w", dtype="float32", shape=(2,))])
    made.greet_with(lambda member: Welcome(session="s", manifest=manifest, mode="auto", shadows=1, keep=()))
    yield made
    made.close()


def test_a_ticket_that_is_used_up(coordinator: Coordinator) -> None:
    def admitted(ticket: str, rank: int = 0) -> Member:
        about: dict[str, Any] = {"version": "default", "digest": "", "dirty": False, "highest": 0}
        return coordinator._admit(b"x", Hello(ticket=ticket, engine="e", rank=rank, world_size=1, facts=FACTS, **about))

    ticket = coordinator.issue_ticket("e", 1)
    Mistake(
        make=lambda: admitted(ticket, rank=1), error=AuthError, said="does not admit rank 1 of 1", hint="Connect again"
    ).play()
    admitted(ticket)
    Mistake(
        make=lambda: admitted(ticket), error=AuthError, said="unknown, used or out of date",
        hint="Connect again: a ticket is good for one engine, once for each rank",
        follow=lambda: admitted(coordinator.issue_ticket("e", 1)),
    ).play()  # fmt: skip


def test_a_key_that_is_not_the_trainers(coordinator: Coordinator) -> None:
    def greet(public_key: str) -> None:
        info = JoinInfo(
            address=f"tcp://127.0.0.1:{coordinator.port}", public_key=public_key, engine="e",
            ticket=coordinator.issue_ticket("e", 1), timeout_s=20,
        )  # fmt: skip
        greeting = Greeting(info, IDENTITY)
        try:
            greeting.welcome()
        finally:
            greeting.close("enough")

    other = Coordinator()
    try:
        Mistake(
            make=lambda: greet(other.public_key), error=PeerLost, said="closed before the trainer had answered",
            hint="the address and the public key its own", follow=lambda: greet(coordinator.public_key),
        ).play()  # fmt: skip
    finally:
        other.close()


def test_a_host_that_takes_a_connection_and_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        info = JoinInfo(
            address=f"tcp://127.0.0.1:{silent.getsockname()[1]}", public_key=zmq.curve_keypair()[0].decode(), engine="e",
            ticket="t", timeout_s=0.3,
        )  # fmt: skip
        greeting = Greeting(info, IDENTITY)
        try:
            Mistake(
                make=greeting.welcome, error=DeadlineExceeded, said="did not answer in",
                hint="that this host reaches that address and that the public key is the trainer's",
            ).play()  # fmt: skip
        finally:
            greeting.close("enough")


def test_workers_that_do_not_come(coordinator: Coordinator) -> None:
    Mistake(
        make=lambda: coordinator.wait_members("e", 2, Deadline(0.05)), error=DeadlineExceeded,
        said="0 of 2 workers joined", hint="reach the trainer's control address",
    ).play()  # fmt: skip
