"""publish(wait=False): engines get the values of the moment of the call, byte for byte, whatever the trainer does meanwhile."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tiny_adapters import base, lora, merged, scatter
from torch import nn

from weightcast import Publisher
from weightcast.errors import DeadlineExceeded, InvalidInput, RoundFailed, StateError, Unsupported
from weightcast.sources import ModuleSource, StreamSource
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.trainer.progress import Step


def small_model() -> nn.Module:
    return nn.Sequential(nn.Linear(24, 40), nn.LayerNorm(40), nn.Linear(40, 24, bias=False))


def learn(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(8, 24)).square().mean().backward()
    optimizer.step()


class Gate:
    """Keeps a round from going on before a test says so. Open at first."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()
        self.reached = threading.Event()

    def __call__(self, step: Step) -> None:
        if threading.current_thread().name == "weightcast-publishing":
            self.reached.set()
            self._open.wait(30)

    @contextmanager
    def closed(self) -> Iterator[None]:
        self._open.clear()
        self.reached.clear()
        try:
            yield
        finally:
            self._open.set()


def copied(tensors: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in tensors.items()}


SOURCES: dict[str, Callable[[nn.Module], Any]] = {
    "module": lambda model: model,
    "state dict": lambda model: model.state_dict(),
}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize(
    ("transport", "mode"), [("shm", "staged"), ("shm", "in_place"), ("tcp", "staged"), ("tcp", "in_place")]
)
def test_engines_serve_the_values_of_the_call_while_the_trainer_learns_on(transport: Any, mode: Any, kind: str) -> None:
    model, gate = small_model(), Gate()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    engine = LocalEngine("e", [DictModel(model.state_dict(), relocatable=mode == "staged")])
    source = SOURCES[kind](model)
    try:
        with Publisher(source, [engine], transport=transport, mode=mode, timeout_s=30, on_progress=gate) as publisher:
            if transport == "shm":
                publisher.publish()  # a round in the module's own memory comes first
            versions = set()
            for _ in range(4):
                learn(model, optimizer)
                truth = copied(model.state_dict())
                with gate.closed():
                    round_ = publisher.publish(wait=False)
                    assert gate.reached.wait(20)
                    learn(model, optimizer)
                    assert not round_.done
                report = round_.wait(20)
                assert report.digests_match
                assert report.held_s == round_.held_s
                assert report.own_nbytes >= sum(value.nbytes for value in truth.values())
                assert engine.models[0].holds(truth)
                assert not engine.models[0].holds(copied(model.state_dict()))
                versions.add(report.version)
            assert len(versions) == 4
            assert publisher.publish().held_s is None
            assert engine.models[0].holds(copied(model.state_dict()))
        learn(model, optimizer)
    finally:
        engine.stop()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_a_module_with_adapters_is_merged_at_the_moment_of_the_call() -> None:
    model = get_peft_model(base(), lora(modules_to_save=["lm_head"]))
    scatter(model)
    gate, engine = Gate(), LocalEngine("e", [DictModel(merged(model))])
    try:
        with Publisher(model, [engine], timeout_s=30, on_progress=gate) as publisher:
            for _ in range(3):
                scatter(model)
                truth = merged(model)
                with gate.closed():
                    round_ = publisher.publish(wait=False)
                    scatter(model)
                round_.wait()
                assert engine.models[0].holds(truth)
    finally:
        engine.stop()


def test_a_trainer_that_wants_its_memory_back_gets_it_between_such_rounds() -> None:
    model = small_model()
    engine = LocalEngine("e", [DictModel(model.state_dict())])
    try:
        with Publisher(model, [engine], hold="round", timeout_s=30) as publisher:
            for wait in (True, False, False, True, False):
                with torch.no_grad():
                    for value in model.parameters():
                        value.data = torch.randn(value.shape)
                truth = copied(model.state_dict())
                round_ = publisher.publish(wait=wait)  # type: ignore[call-overload]
                assert (round_ if wait else round_.wait()).digests_match
                assert engine.models[0].holds(truth)
    finally:
        engine.stop()


def test_where_there_is_no_room_for_a_snapshot_rounds_that_are_waited_for_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = small_model()
    engine = LocalEngine("e", [DictModel(model.state_dict())])
    try:
        with Publisher(model, [engine], transport="shm", timeout_s=30) as publisher:
            publisher.publish()
            monkeypatch.setattr("weightcast.sources.snapshot.host_room_nbytes", lambda: 4096)
            for _ in range(2):
                with pytest.raises(
                    StateError, match=r"no room for a snapshot of \d+ bytes \(4096 are free\)"
                ) as caught:
                    publisher.publish(wait=False)
                assert "Publish without wait=False" in str(caught.value)
                with torch.no_grad():
                    model[0].weight.normal_()
                assert publisher.publish().held_s is None
                assert engine.models[0].holds(copied(model.state_dict()))
            monkeypatch.undo()
            assert publisher.publish(wait=False).wait().ok
    finally:
        engine.stop()


def test_the_next_call_waits_for_the_round() -> None:
    model, gate = small_model(), Gate()
    engine = LocalEngine("e", [DictModel(model.state_dict())])
    try:
        with Publisher(model, [engine], timeout_s=30, on_progress=gate) as publisher:
            first = copied(model.state_dict())
            with gate.closed():
                round_ = publisher.publish(wait=False)
                with pytest.raises(DeadlineExceeded, match="wait=False was not over"):
                    publisher.publish(timeout_s=0.2)
                with pytest.raises(DeadlineExceeded, match="wait=False was not over"):
                    round_.wait(0.1)
            report = round_.wait()
            assert engine.models[0].holds(first)
            with torch.no_grad():
                model[0].weight.add_(1)
            second = publisher.publish(wait=False)
            third = publisher.publish()
            assert [round_.wait().number, second.wait().number, third.number] == [
                report.number,
                report.number + 1,
                report.number + 2,
            ]
            assert second.wait().digest == third.digest
    finally:
        engine.stop()


def test_an_error_of_the_round_comes_where_it_is_waited_for_and_the_next_round_heals() -> None:
    model = small_model()
    engine = LocalEngine("e", [DictModel(model.state_dict(), through_loader=["0.weight"])])
    try:
        with Publisher(model, [engine], timeout_s=20) as publisher:
            before = publisher.publish().version
            engine.models[0].fail_load = ValueError("no room today")
            round_ = publisher.publish(wait=False)
            for _ in range(2):
                with pytest.raises(RoundFailed, match="was not published"):
                    round_.wait()
            assert round_.done
            engine.models[0].fail_load = None
            with torch.no_grad():
                model[0].weight.mul_(3)
            report = publisher.publish(wait=False).wait()
            assert report.version != before
            assert engine.models[0].holds(copied(model.state_dict()))
    finally:
        engine.stop()


def test_what_keeps_a_snapshot_from_being_taken_is_raised_by_the_call() -> None:
    model = small_model()
    engine = LocalEngine("e", [DictModel(model.state_dict())])
    try:
        with Publisher(model, [engine], timeout_s=20) as publisher:
            publisher.publish(wait=False).wait()
            model[2] = nn.Linear(40, 24, bias=False)
            with pytest.raises(StateError, match="replaced"):
                publisher.publish(wait=False)
            publisher.connect()
            assert publisher.publish(wait=False).wait().digests_match
            assert engine.models[0].holds(copied(model.state_dict()))
            for value in model.parameters():
                value.data = value.data * 2  # elsewhere, in the same form
            assert publisher.publish(wait=False).wait().digests_match
            assert engine.models[0].holds(copied(model.state_dict()))
    finally:
        engine.stop()


def test_what_cannot_go_on_beside_a_trainer_is_refused_by_name() -> None:
    model = small_model()
    engine = LocalEngine("e", [DictModel(model.state_dict())])
    try:
        with Publisher(StreamSource(lambda: model.state_dict().items()), [engine], timeout_s=20) as publisher:
            with pytest.raises(Unsupported, match="stream is read while"):
                publisher.publish(wait=False)
            publisher.publish()
        with Publisher(ModuleSource(model), [engine], transport="shm", timeout_s=20, takeover=True) as publisher:
            publisher.publish()
            with pytest.raises(Unsupported, match="tensors of this ModuleSource have moved") as caught:
                publisher.publish(wait=False)
            assert "from the first round on" in str(caught.value)
            with pytest.raises(InvalidInput, match="wake and wait=False"):
                publisher.publish(wait=False, wake=True)  # type: ignore[call-overload]
            publisher.publish()
        with Publisher(ModuleSource(model), [engine], transport="shm", timeout_s=20, takeover=True) as publisher:
            for _ in range(2):
                with torch.no_grad():
                    model[0].weight.mul_(3)
                truth = copied(model.state_dict())
                publisher.publish(wait=False).wait()
                assert engine.models[0].holds(truth)
    finally:
        engine.stop()


@pytest.mark.parametrize("fails", [False, True])
def test_leaving_the_context_waits_for_the_round_or_calls_it_off(fails: bool) -> None:
    model, gate = small_model(), Gate()
    engine = LocalEngine("e", [DictModel(model.state_dict())])
    start = copied(model.state_dict())
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn(value.shape))
    truth = copied(model.state_dict())
    opened = threading.Timer(0.3, gate._open.set)
    try:
        with pytest.raises(ZeroDivisionError) if fails else gate.closed():
            gate._open.clear()
            with Publisher(model, [engine], timeout_s=30, on_progress=gate) as publisher:
                round_ = publisher.publish(wait=False)
                assert gate.reached.wait(20)
                opened.start()
                assert not fails or 1 / 0
        assert round_.done
        assert engine.models[0].holds(start if fails else truth)
        if fails:
            with pytest.raises((RoundFailed, DeadlineExceeded)):
                round_.wait()
    finally:
        opened.cancel()
        engine.stop()


def test_nothing_is_left_of_rounds_and_their_snapshots() -> None:
    model = small_model()
    engine = LocalEngine("e", [DictModel(model.state_dict())])
    addresses = {name: value.data_ptr() for name, value in model.named_parameters()}
    try:
        with Publisher(model, [engine], transport="shm", timeout_s=20) as publisher:
            sizes = set()
            for _ in range(5):
                sizes.add(publisher.publish(wait=False).wait().own_nbytes)
            assert len(sizes) == 1
            # The user's tensors are not moved for a snapshot.
            assert addresses == {name: value.data_ptr() for name, value in model.named_parameters()}
        gc.collect()
        assert not [thread for thread in threading.enumerate() if thread.name == "weightcast-publishing"]
    finally:
        engine.stop()
