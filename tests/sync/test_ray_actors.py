"""Engines in Ray actors: what a RayEngineClient says where there is none, and how its calls find one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from weightcast import Publisher
from weightcast.errors import ErrorForm, InvalidInput
from weightcast.trainer.clients import RayEngineClient, make_client
from weightcast.trainer.clients.ray import carry_out


class Engine:
    """As much of an engine object as is asked for its size."""

    def __init__(self, size: int) -> None:
        self.size = size

    def get_world_size(self) -> int:
        return self.size


def test_what_is_no_actor_is_told() -> None:
    with pytest.raises(InvalidInput, match="a Engine is no handle of a Ray actor") as caught:
        RayEngineClient(Engine(1))
    assert caught.value.field == "engines"
    assert "ray.get_actor" in (caught.value.hint or "")


def test_a_handle_without_its_client_is_told_which() -> None:
    handle = type("ActorHandle", (), {"__module__": "ray.actor"})()
    for call in (lambda: make_client(handle), lambda: Publisher({"w": torch.rand(2)}, [handle])):
        with pytest.raises(InvalidInput) as caught:
            call()
        assert caught.value.hint == "Give RayEngineClient(actor)"


@pytest.mark.parametrize("actor", [SimpleNamespace(), SimpleNamespace(llm=None)])
def test_an_actor_without_an_engine_says_so(actor: Any) -> None:
    answer = carry_out(actor, "llm", "world_size", (), 1.0)
    error = msgspec.convert(answer["error"], ErrorForm).error()
    assert isinstance(error, InvalidInput)
    assert error.field == "attribute"
    assert "has no engine in its attribute 'llm'" in str(error)


def test_an_engine_is_found_where_it_is_said_to_be_and_anew_once_replaced() -> None:
    actor = SimpleNamespace(worker=SimpleNamespace(engine=Engine(2)))
    assert carry_out(actor, "worker.engine", "world_size", (), 1.0) == {"value": 2}
    kept = actor._weightcast_calls
    assert carry_out(actor, "worker.engine", "world_size", (), 1.0) == {"value": 2}
    assert actor._weightcast_calls is kept
    actor.worker.engine = Engine(3)
    assert carry_out(actor, "worker.engine", "world_size", (), 1.0) == {"value": 3}
