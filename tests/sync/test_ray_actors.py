"""What a Publisher says of Ray actors that it cannot call; the example examples/rlhf.py runs with ones that it can."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch

from weightcast import Publisher
from weightcast.errors import ErrorForm, InvalidInput
from weightcast.trainer.clients import PublishedTo, RayEngineClient, make_client


class Foreign:
    """An actor's handle as Ray makes it: what its class has not is an AttributeError."""


def test_a_foreign_actor_is_told_what_it_needs() -> None:
    with pytest.raises(InvalidInput, match="no Ray actor that a Publisher can call") as caught:
        RayEngineClient(Foreign())
    assert caught.value.field == "engines"
    assert "PublishedTo" in (caught.value.hint or "")


def test_a_handle_without_its_client_is_told_which() -> None:
    handle = type("ActorHandle", (), {"__module__": "ray.actor"})()
    for call in (lambda: make_client(handle), lambda: Publisher({"w": torch.rand(2)}, [handle])):
        with pytest.raises(InvalidInput) as caught:
            call()
        assert caught.value.hint == "Give RayEngineClient(actor)"


@pytest.mark.parametrize("llm", [None, "unset"])
def test_an_actor_without_an_engine_says_so(llm: Any) -> None:
    actor = PublishedTo()
    if llm is None:
        actor.llm = None
    answer = actor.weightcast_call("world_size", (), 1.0)
    error = msgspec.convert(answer["error"], ErrorForm).error()
    assert isinstance(error, InvalidInput)
    assert (error.field, error.hint) == ("llm", "Set its self.llm")
