"""Who may call a Publisher: one thread at a time, in the process that made it, with whatever torch is set to there."""

from __future__ import annotations

import multiprocessing
import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from torch import nn

from weightcast import Publisher
from weightcast.errors import StateError, TransportError, WeightcastError
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.testing.ranks import run_ranks


def policy() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 5, dtype=torch.bfloat16))


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, device="cpu"))


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.fixture
def engine() -> Iterator[LocalEngine]:
    made = LocalEngine("a", [DictModel(state(policy()))])
    yield made
    made.stop()


CALLS: list[tuple[str, Callable[[Publisher], object]]] = [
    ("publish", lambda publisher: publisher.publish()),
    ("connect", lambda publisher: publisher.connect()),
    ("add", lambda publisher: publisher.add("http://127.0.0.1:9")),
    ("remove", lambda publisher: publisher.remove("a")),
    ("prepare", lambda publisher: publisher.prepare()),
]


def test_a_second_thread_is_told_at_once_and_the_first_goes_on(engine: LocalEngine) -> None:
    module = policy()
    reached, go_on = threading.Event(), threading.Event()

    def wait_in_commit(phase: str) -> None:
        if phase == "commit":
            reached.set()
            assert go_on.wait(20)

    with Publisher(module, [engine], timeout_s=30) as publisher:
        publisher.publish()
        randomise(module)
        engine.before = wait_in_commit
        reports = []
        thread = threading.Thread(target=lambda: reports.append(publisher.publish()), name="first")
        thread.start()
        assert reached.wait(20)
        for what, call in CALLS:
            with pytest.raises(StateError, match=rf"{what}\(\) was called while publish\(\) runs in thread 'first'"):
                call(publisher)
        go_on.set()
        thread.join()
        assert reports[0].number == 2
        assert engine.models[0].holds(state(module))
        assert publisher.publish().number == 3


def test_a_forked_child_has_its_own_weights_and_no_publisher(engine: LocalEngine) -> None:
    module = policy()
    context = multiprocessing.get_context("fork")

    def child(channel: Connection) -> None:
        errors = []
        for _, call in CALLS:
            try:
                call(publisher)
                errors.append("nothing")
            except WeightcastError as error:
                errors.append(f"{type(error).__name__}: {error}")
        randomise(module)
        with publisher:
            pass
        channel.send((errors, {name: value.tolist() for name, value in module.state_dict().items()}))

    with Publisher(module, [engine], transport="shm", timeout_s=30) as publisher:
        randomise(module)
        publisher.publish()
        before = state(module)
        here, there = context.Pipe()
        process = context.Process(target=child, args=(there,))
        process.start()
        assert here.poll(30)
        errors, written = here.recv()
        process.join(30)
        assert process.exitcode == 0
        for (what, _), error in zip(CALLS, errors, strict=True):
            assert error.startswith(
                f"StateError: {what}() in process {process.pid}, which was forked from process {os.getpid()}"
            )
        for name, value in module.state_dict().items():
            assert torch.equal(value, before[name])
            assert written[name] != value.tolist()
        for _ in range(2):
            randomise(module)
            publisher.publish()
            assert engine.models[0].holds(state(module))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("kind", ["module", "state dict"])
@pytest.mark.parametrize(
    "setting",
    [
        lambda: torch.device("meta"),
        lambda: default_device("meta"),
        lambda: default_dtype(torch.float64),
        lambda: default_dtype(torch.bfloat16),
        lambda: torch.inference_mode(),
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    ],
    ids=["device", "default device", "float64", "bfloat16", "inference", "autocast"],
)
def test_rounds_do_not_depend_on_what_torch_is_set_to(
    engine: LocalEngine, transport: str, kind: str, setting: Callable[[], AbstractContextManager[None]]
) -> None:
    module = policy()
    source = module if kind == "module" else module.state_dict()
    with setting():
        publisher = Publisher(source, [engine], transport=transport, timeout_s=30)
    for inside in (True, False, True):
        randomise(module)
        if inside:
            with setting():
                publisher.publish()
        else:
            publisher.publish()
        assert engine.models[0].holds(state(module))
    with setting():
        publisher.close()
    randomise(module)


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open("/dev/null", os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    held = []
    try:
        while True:  # those below that are free
            held.append(os.dup(0))
    except OSError:
        pass
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for descriptor in held:
            os.close(descriptor)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_no_descriptor_left_is_an_error_by_name_and_the_next_call_works(engine: LocalEngine, transport: str) -> None:
    module = policy()
    with no_descriptor_left(), pytest.raises(TransportError, match="no more files"):
        Publisher(module, [engine], transport=transport, timeout_s=10)
    with Publisher(module, [engine], transport=transport, timeout_s=10) as publisher:
        randomise(module)
        with no_descriptor_left(), pytest.raises(WeightcastError):
            publisher.publish()
        publisher.publish()
        assert engine.models[0].holds(state(module))
    assert len(os.listdir("/proc/self/fd")) < 1000
    assert Path("/proc/self/fd").is_dir()


def publish_with_few_descriptors(rank: int, size: int) -> list[str]:
    limits, told = resource.getrlimit(resource.RLIMIT_NOFILE), []
    for spare in range(0, 40, 3):
        engine = LocalEngine("few", [DictModel({"w": torch.zeros(4, 5)})])
        free = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + spare, limits[1]))
        try:
            with Publisher({"w": torch.randn(4, 5)}, [engine], transport="shm", timeout_s=10) as publisher:
                told.append(str(publisher.publish().ok))
        except WeightcastError as error:
            told.append(type(error).__name__)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            engine.stop()
    return told


def test_few_descriptors_left_are_an_error_by_name_and_never_the_end_of_the_process() -> None:
    """libzmq calls abort() where it finds none in the middle of making a context."""
    (told,) = run_ranks(publish_with_few_descriptors, 1)
    assert (told[0], told[-1]) == ("TransportError", "True")
    assert set(told) == {"TransportError", "True"}, told
