"""Calls that are called off: by close() from another thread, by close() in the middle of a call, by what a signal's handler raises. None
hangs, none ends in a puzzle, and what comes afterwards publishes what the trainer holds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from weightcast import Publisher
from weightcast.control.coordinator import Coordinator
from weightcast.errors import RoundFailed, StateError, WeightcastError
from weightcast.sources.holder import Holder
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.trainer import publisher as publishers
from weightcast.trainer.progress import Step

LONG_S = 300.0
HANG_S = 110.0
STEPS = ("set-up", "gather", "begin", "transfer", "verify", "commit")
"""Those that the thread of the call itself tells of."""


def policy() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 5, dtype=torch.bfloat16))


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape))


def holds(engine: LocalEngine, module: nn.Module) -> bool:
    return engine.models[0].holds({name: value.detach() for name, value in module.state_dict().items()})


@pytest.fixture
def engines() -> Iterator[list[LocalEngine]]:
    form = {name: torch.zeros_like(value) for name, value in policy().state_dict().items()}
    made = [LocalEngine(name, [DictModel(form)]) for name in ("a", "b")]
    yield made
    for engine in made:
        engine.stop()


def outcome(call: Callable[[], object]) -> BaseException | None:
    """The error of a call that is made on a thread of its own; None where it returns. A call that hangs fails the test."""
    errors: list[BaseException | None] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)
        else:
            errors.append(None)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(HANG_S)
    assert not thread.is_alive(), "it hangs"
    return errors[0]


def is_gone(publisher: Publisher) -> bool:
    """Whether the thread and the sockets of its control channel are freed."""
    thread = publisher._part._coordinator._pump._thread  # type: ignore[union-attr]
    thread.join(HANG_S)
    return not thread.is_alive()


def test_a_round_whose_worker_does_not_answer_ends_when_another_thread_closes(engines: list[LocalEngine]) -> None:
    module = policy()
    publisher = Publisher(module, engines, timeout_s=LONG_S)
    publisher.publish(timeout_s=HANG_S)
    mute = engines[0].workers[0].receiver
    waits = threading.Event()
    mute._session._send_staged = lambda *_: waits.set()  # type: ignore[method-assign, union-attr]
    randomise(module)
    errors = []

    def publish() -> None:
        errors.append(outcome(publisher.publish))

    thread = threading.Thread(target=publish, daemon=True)
    thread.start()
    assert waits.wait(HANG_S)
    assert outcome(publisher.close) is None
    thread.join(HANG_S)
    assert isinstance(errors[0], RoundFailed)
    assert errors[0].hint == "Make a new Publisher"
    assert {cause.message for cause in errors[0].causes.values()} == {"waiting for its answer was called off"}
    with Publisher(
        module, engines, timeout_s=HANG_S, takeover=True
    ) as other:  # on a busy machine the goodbye comes late
        other.publish()
        assert all(holds(engine, module) for engine in engines)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("step", STEPS)
def test_a_call_that_is_closed_from_within_ends_and_then_closes(
    engines: list[LocalEngine], step: str, transport: str
) -> None:
    """As a signal's handler does, which interrupts a call at any place and may find any lock taken."""
    module, closed = policy(), list[Step]()

    def close(at: Step) -> None:
        if at.phase == step and not closed:
            closed.append(at)
            publisher.close()

    publisher = Publisher(module, engines, transport=transport, timeout_s=HANG_S, on_progress=close)
    error = outcome(publisher.publish)
    assert closed
    assert error is None or isinstance(error, WeightcastError), repr(error)
    with pytest.raises(StateError, match="the publisher is closed"):
        publisher.publish()
    assert is_gone(publisher)
    randomise(module)
    with Publisher(
        module, engines, timeout_s=HANG_S, takeover=True
    ) as other:  # on a busy machine the goodbye comes late
        other.publish()
        assert all(holds(engine, module) for engine in engines)


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_values_that_a_call_took_before_it_was_interrupted_are_not_published_later(
    engines: list[LocalEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = policy()
    with Publisher(module, engines, timeout_s=HANG_S) as publisher:
        publisher.publish(wait=False).wait()
        for wait in (True, False):
            with monkeypatch.context() as patch:
                patch.setattr(publishers, "Publishing", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    publisher.publish(wait=False)
            randomise(module)
            if wait:
                publisher.publish()
            else:
                publisher.publish(wait=False).wait()
            assert all(holds(engine, module) for engine in engines)


def test_a_first_snapshot_that_was_interrupted_is_made_by_the_next_call(
    engines: list[LocalEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = policy()
    kept = module.state_dict()  # these tensors stay where they are
    with Publisher(module, engines, timeout_s=HANG_S) as publisher:
        publisher.publish()
        release = Holder.release

        def release_and_interrupt(self: Holder) -> None:
            release(self)
            interrupt()

        with monkeypatch.context() as patch:
            patch.setattr(Holder, "release", release_and_interrupt)
            with pytest.raises(KeyboardInterrupt):
                publisher.publish(wait=False)
        for wait in (True, False, True):
            randomise(module)
            if wait:
                publisher.publish()
            else:
                publisher.publish(wait=False).wait()
            assert all(engine.models[0].holds(kept) for engine in engines)


def test_an_engine_whose_removal_or_addition_was_interrupted_is_in_no_ones_way(
    engines: list[LocalEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = policy()
    a, b = engines
    with Publisher(module, engines, timeout_s=HANG_S) as publisher:
        publisher.publish()
        with monkeypatch.context() as patch:
            patch.setattr(b, "close", interrupt)
            with pytest.raises(KeyboardInterrupt):
                publisher.remove("b")
        randomise(module)
        publisher.publish()
        assert holds(a, module)
        with monkeypatch.context() as patch:
            patch.setattr(b, "before", interrupt)
            with pytest.raises(KeyboardInterrupt):
                publisher.add(b)
        assert set(publisher.members) == {"a"}
        publisher.add(b)
        for _ in range(2):
            randomise(module)
            publisher.publish()
            assert holds(a, module)
            assert holds(b, module)


def test_what_interrupts_close_leaves_nothing_open(engines: list[LocalEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    module = policy()
    publisher = Publisher(module, engines, transport="shm", timeout_s=HANG_S)
    publisher.publish()
    shared = [parameter.data_ptr() for parameter in module.parameters()]
    monkeypatch.setattr(Coordinator, "wait_goodbyes", interrupt)
    with pytest.raises(KeyboardInterrupt):
        publisher.close()
    assert not set(shared) & {parameter.data_ptr() for parameter in module.parameters()}
    assert is_gone(publisher)
    publisher.close()
