"""Joining waits for the trainer beside the engine: its thread goes on with steps and commands until the trainer has answered."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq

from weightcast.control import Coordinator
from weightcast.control.link import JoinInfo
from weightcast.engines.embedded import LLM
from weightcast.errors import DeadlineExceeded, PeerLost, StateError
from weightcast.manifest import Manifest, TensorSpec
from weightcast.messages import Welcome
from weightcast.receiver.receiver import Receiver
from weightcast.testing.local_engine import DictModel
from weightcast.testing.models import build_tiny_model

MANIFEST = Manifest.of([TensorSpec(name="w", dtype="float32", shape=(3,))])


def info(address: str, key: str, ticket: str = "t", **more: Any) -> dict[str, Any]:
    return {"address": address, "public_key": key, "ticket": ticket, "engine": "e", **more}


@pytest.fixture
def silent() -> Iterator[dict[str, Any]]:
    """Where somebody listens and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield info(f"tcp://127.0.0.1:{server.getsockname()[1]}", zmq.curve_keypair()[0].decode(), timeout_s=2.5)


@pytest.fixture
def coordinator() -> Iterator[Coordinator]:
    made = Coordinator()
    made.greet_with(lambda member: Welcome(session="s", manifest=MANIFEST, mode="auto", shadows=1, keep=()))
    yield made
    made.close()


def test_the_engines_thread_goes_on_while_a_trainer_does_not_answer(tmp_path: Path, silent: dict[str, Any]) -> None:
    with LLM(str(build_tiny_model(tmp_path / "m")), num_threads=1) as llm:
        joining = llm.engine.init_transfer(silent)
        for _ in range(20):
            # Commands run one behind the other on the engine's thread: each would wait behind the joining.
            assert llm.engine.run_between_steps(lambda: "done").result(20) == "done"
            assert not joining.done()
        # Its silence and the end of the wait for it are noticed by two threads.
        with pytest.raises((DeadlineExceeded, PeerLost), match="did not answer"):
            joining.result(20)


def test_greeting_returns_at_once_and_joining_goes_on_with_it(coordinator: Coordinator) -> None:
    receiver = Receiver(DictModel({"w": torch.randn(3)}))
    there = JoinInfo(
        **info(f"tcp://127.0.0.1:{coordinator.port}", coordinator.public_key, coordinator.issue_ticket("e", 1))
    )
    first = receiver.greet(there)
    assert receiver.greet(there) is first
    first.wait()
    assert first.is_over()
    receiver.join(there)  # the ticket would not admit it a second time
    assert receiver.joined
    assert receiver.greet(JoinInfo(**{**info(there.address, there.public_key), "takeover": True})) is not first
    receiver.leave()
    assert not receiver.joined
    assert receiver._greeting is None


def test_a_greeting_that_nobody_takes_up_is_left_with_the_next_one(
    silent: dict[str, Any], coordinator: Coordinator
) -> None:
    receiver = Receiver(DictModel({"w": torch.randn(3)}))
    abandoned = receiver.greet(JoinInfo(**silent))
    assert not abandoned.is_over()
    receiver.join(
        JoinInfo(
            **info(f"tcp://127.0.0.1:{coordinator.port}", coordinator.public_key, coordinator.issue_ticket("e", 1))
        )
    )
    assert receiver.joined
    assert abandoned.link._ended
    with pytest.raises(StateError, match="another trainer"):
        receiver.greet(JoinInfo(**silent))
    assert receiver.joined
    receiver.leave()


def test_a_second_name_is_refused_while_the_trainer_is_greeted_under_the_first(silent: dict[str, Any]) -> None:
    receiver = Receiver(DictModel({"w": torch.randn(3)}))
    first = receiver.greet(JoinInfo(**silent, session="s"))
    twice = {**silent, "engine": "f", "session": "s"}
    with pytest.raises(StateError, match="'e' and 'f' are one engine"):
        receiver.greet(JoinInfo(**twice))
    assert receiver._greeting is first
    assert receiver.greet(JoinInfo(**twice, left=["e"])) is not first, "the trainer has dismissed the first name"
    with pytest.raises(PeerLost):
        first.welcome()  # whoever waits for a greeting that was left waits no longer
    assert receiver.greet(JoinInfo(**{**twice, "engine": "g", "session": "another"})).has_hope
    receiver.leave()


def test_a_trainer_that_leaves_behind_its_welcome_is_told(coordinator: Coordinator) -> None:
    receiver = Receiver(DictModel({"w": torch.randn(3)}))
    there = JoinInfo(
        **info(f"tcp://127.0.0.1:{coordinator.port}", coordinator.public_key, coordinator.issue_ticket("e", 1))
    )
    met = receiver.greet(there)
    met.wait()
    coordinator.close()
    while len(met._heard) < 2:
        met.link._pump.flush(0.1)
    receiver.join(there)
    assert not receiver.joined
