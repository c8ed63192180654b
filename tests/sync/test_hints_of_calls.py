"""Hints about calls, engine objects and files: the mistake, the hint, and the hint followed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.support.mistakes import Mistake
from torch import nn

from weightcast import Publisher
from weightcast.commit.stock import StockEngine
from weightcast.deadline import Deadline
from weightcast.errors import InvalidInput, PlanMismatch, ProtocolError, StateError, TransportError, Unsupported
from weightcast.manifest import Manifest, TensorSpec
from weightcast.manifest.adapters import factors_of
from weightcast.sources import StreamSource, make_source
from weightcast.sources.adapters import _chosen
from weightcast.sources.holder import GivenUp
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.testing.scripted_engine import ScriptedEngine
from weightcast.trainer.clients import EngineClient, RayEngineClient
from weightcast.trainer.clients.making import make_client
from weightcast.trainer.clients.ray import _engine_of
from weightcast.trainer.clients.rpc import RpcEngineClient
from weightcast.trainer.clients.urls import endpoint_of
from weightcast.trainer.fleet.link import _believed
from weightcast.trainer.fleet.rejoin import Rejoiner
from weightcast.trainer.turns import Turns, undisturbed
from weightcast.transports.files import CHECKPOINT_ROOT, OpenFile, file_ref
from weightcast.transports.shm import ShmWorkerEnd

MERGED = r"Publish the merged weights: Publisher\(peft_model, engines\) without adapter="
AGAIN = r"connect\(\)"
WEIGHTS = {"w": torch.randn(4, 3), "v": torch.randn(3)}


def stream() -> Iterator[tuple[str, torch.Tensor]]:
    yield from WEIGHTS.items()


@pytest.fixture
def engine() -> Iterator[LocalEngine]:
    made = LocalEngine("e", [DictModel({name: torch.zeros_like(value) for name, value in WEIGHTS.items()})])
    yield made
    made.stop()


def _published(engine: LocalEngine) -> Callable[[], None]:
    def publish() -> None:
        with Publisher(WEIGHTS, [engine], timeout_s=20) as publisher:
            assert publisher.publish().digests_match
        assert engine.models[0].holds(WEIGHTS)

    return publish


async def _in_a_coroutine() -> None:
    assert make_client(ScriptedEngine()).kind


def _manifest(*names: str) -> Manifest:
    return Manifest.of([TensorSpec(name=name, dtype="float32", shape=(2, 2)) for name in names])


def _saved(*active: str) -> SimpleNamespace:
    copies = {"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}
    return SimpleNamespace(modules_to_save=copies, active_adapters=active, disable_adapters=False)


ACTOR = SimpleNamespace(policy=object())
OTHER: Any = SimpleNamespace(name="e", kind="another", product="Another")
NOBODY: Any = SimpleNamespace(_attempts={}, _source=None, are_over=True)


def _raised(error: Exception | None) -> None:
    assert error is not None
    raise error


def _closed_meanwhile() -> None:
    with Turns._told_apart(NOBODY, "publish"):
        raise ZeroDivisionError("what a closed source leads to")


def _too_many_files() -> None:
    with undisturbed():
        raise OSError(24, "Too many open files")


CALLS: dict[str, Callable[[LocalEngine], Mistake]] = {
    "an engine of an event loop, without one": lambda engine: Mistake(
        make=lambda: make_client(ScriptedEngine()), error=InvalidInput, said="belongs to an event loop, and none runs here",
        hint=r"in a coroutine, and then: await asyncio\.to_thread", follow=lambda: asyncio.run(_in_a_coroutine()),
    ),
    "no handle of an actor": lambda engine: Mistake(
        make=lambda: RayEngineClient(ACTOR), error=InvalidInput, said="is no handle of a Ray actor",
        hint=r"Give what ray\.remote\(Engine\)\.remote\(\.\.\.\)",
        follow=lambda: RayEngineClient(SimpleNamespace(__ray_call__=print)),
    ),
    "another attribute of an actor": lambda engine: Mistake(
        make=lambda: _engine_of(ACTOR, "llm"), error=InvalidInput, said="has no engine in its attribute 'llm'",
        hint=r"RayEngineClient\(actor, attribute=", follow=lambda: _engine_of(ACTOR, "policy"),
    ),
    "an adapter for an engine of whole weights": lambda engine: Mistake(
        make=lambda: engine.for_adapter("a"), error=Unsupported, said="takes whole weights, and no adapters",
        hint=MERGED, follow=_published(engine),
    ),
    "a tensor of no adapter": lambda engine: Mistake(
        make=lambda: factors_of(_manifest("w.weight")), error=PlanMismatch, said="'w.weight' is no matrix of a LoRA adapter",
        hint=MERGED, follow=_published(engine),
    ),
    "half an adapter": lambda engine: Mistake(
        make=lambda: factors_of(_manifest("base_model.model.q.lora_A.weight")), error=PlanMismatch, said="q lacks A or B",
        hint=MERGED, follow=_published(engine),
    ),
    "a wrapper of PEFT's that is not known": lambda engine: Mistake(
        make=lambda: _chosen(SimpleNamespace(), "head"), error=Unsupported, said="'head' is a SimpleNamespace of PEFT, which is not known",
        hint="[Mm]erge", follow=_published(engine),
    ),
    "two active copies of a module": lambda engine: Mistake(
        make=lambda: _chosen(_saved("a", "b"), "head"), error=StateError, said=r"several active modules_to_save \(a, b\)",
        hint=r"Activate one of them with set_adapter\(\)", follow=lambda: _chosen(_saved("b"), "head"),
    ),
    "a relative path of a socket": lambda engine: Mistake(
        make=lambda: endpoint_of("unix://run/engine.sock"), error=InvalidInput, said="an engine is .*not 'unix://run",
        hint="The path is absolute", follow=lambda: endpoint_of("unix:///run/engine.sock"),
    ),
    "no stream for a round": lambda engine: Mistake(
        make=StreamSource(metadata=[("w", torch.float32, (2,))]).new_pass, error=StateError, said="no stream to read",
        hint=r"publish\(stream\)", follow=lambda: StreamSource(stream).new_pass(),
    ),
    "a number that an engine cannot have": lambda engine: Mistake(
        make=lambda: _believed(10**12, 3), error=ProtocolError, said="version number 1000000000000, and 3 is the highest",
        hint="Restart the engine, .*or give the Publisher the log=", follow=lambda: _believed(4, 3),
    ),
    "a publisher that another thread closed while it joined": lambda engine: Mistake(
        make=lambda: _raised(Rejoiner._outcome(NOBODY, OTHER)), error=StateError, said="joining was called off .*engine e",
        hint="closed on another thread: make a new one", follow=_published(engine),
    ),
    "a publisher that another thread closed while it published": lambda engine: Mistake(
        make=_closed_meanwhile, error=StateError, said=r"publish\(\) was called off: the publisher was closed",
        hint="Make a new Publisher", follow=_published(engine),
    ),
    "too many open files": lambda engine: Mistake(
        make=_too_many_files, error=TransportError, said="may open no more files and sockets: .*Too many open files",
        hint=r"Raise the limit \(ulimit -n\)", follow=_published(engine),
    ),
    "a pair of shm that is not connected": lambda engine: Mistake(
        make=lambda: ShmWorkerEnd._connected(NOBODY), error=TransportError, said="not connected", hint=r"connect\(\) first",
    ),
    "a source after its end": lambda engine: Mistake(
        make=GivenUp().refresh, error=StateError, said="the publisher is closed", hint="Make a new Publisher",
        follow=_published(engine),
    ),
    "new names of an adapter": lambda engine: Mistake(
        make=lambda: make_source(nn.Linear(2, 2), adapter="a", rename=str.upper), error=InvalidInput,
        said="rename has no effect on an adapter", hint="Leave it out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_calls(name: str, engine: LocalEngine) -> None:
    CALLS[name](engine).play()


def test_a_stream_beside_training(engine: LocalEngine) -> None:
    with Publisher(stream, [engine], timeout_s=20) as publisher:
        publisher.publish()
        Mistake(
            make=lambda: publisher.publish(wait=False), error=Unsupported, said="a stream is read while its round runs",
            hint="without wait=False", follow=publisher.publish,
        ).play()  # fmt: skip
        Mistake(
            make=lambda: publisher.publish(stream(), wait=False), error=InvalidInput, said="stream and wait=False exclude",
            hint="Leave wait=False out", follow=lambda: publisher.publish(stream()),
        ).play()  # fmt: skip
        assert engine.models[0].holds(WEIGHTS)


def test_a_callback_before_its_training() -> None:
    pytest.importorskip("transformers")
    from weightcast.integrations.trl import PublishCallback

    module = nn.Linear(3, 4)
    other = LocalEngine("o", [DictModel({n: torch.zeros_like(v) for n, v in module.state_dict().items()})])
    callback = PublishCallback([other], timeout_s=20)
    state = SimpleNamespace(is_world_process_zero=False)
    Mistake(
        make=lambda: callback.publisher, error=StateError, said="has a Publisher while its trainer trains",
        hint=r"Call trainer\.train\(\)", follow=lambda: callback.on_train_begin(None, state, None, model=module),
    ).play()  # fmt: skip
    assert callback.publisher.publish().digests_match
    callback.on_train_end(None, state, None)
    other.stop()


def test_files_that_are_not_what_was_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHECKPOINT_ROOT, str(tmp_path))
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.randn(3)}, path)
    size = path.stat().st_size
    offered = file_ref(str(path), 0, size)
    path.unlink()

    def write_anew() -> None:
        save_file({"w": torch.randn(3)}, path)

    Mistake(
        make=lambda: OpenFile(offered), error=TransportError, said="cannot open .*w.safetensors",
        hint="Trainer and worker must see the same files", follow=write_anew,
    ).play()  # fmt: skip
    Mistake(
        make=lambda: OpenFile(offered), error=TransportError, said="was changed since it was offered",
        hint="Publish it again", follow=lambda: OpenFile(file_ref(str(path), 0, size)).close(),
    ).play()  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_adapters_whose_parts_were_replaced() -> None:
    peft = pytest.importorskip("peft")
    from tiny_adapters import base, lora

    model = peft.get_peft_model(base(), lora())
    plain = {name: value.detach().clone() for name, value in base().state_dict().items()}
    engine = LocalEngine("e", [DictModel(plain)])
    with Publisher(model, [engine], timeout_s=30) as publisher:
        publisher.publish()
        part = next(module for module in model.modules() if hasattr(module, "lora_A"))

        def replaced() -> None:
            part.base_layer.weight = nn.Parameter(torch.randn_like(part.base_layer.weight))
            publisher.publish()

        def again() -> None:
            publisher.connect()
            assert publisher.publish().digests_match

        Mistake(make=replaced, error=StateError, said="was replaced", hint=AGAIN, follow=again).play()
    engine.stop()


def test_engines_that_have_no_adapters_and_cannot_sleep(engine: LocalEngine) -> None:
    deadline = Deadline(5)
    for call in (
        lambda: RpcEngineClient.call_about_adapter(OTHER, "status", {}, deadline),
        lambda: RpcEngineClient.point(OTHER, "policy", "", {}, deadline),
        lambda: RpcEngineClient.retire(OTHER, "policy", []),
        lambda: StockEngine.require_adapters(OTHER),
    ):
        Mistake(make=call, error=Unsupported, said="no adapters", hint=MERGED).play()
    for call in (
        lambda: RpcEngineClient.wake_up(OTHER, [], deadline),
        lambda: EngineClient.wake(OTHER, [], deadline),
        lambda: EngineClient.shutdown(OTHER, deadline),
    ):
        Mistake(
            make=call, error=Unsupported, said="cannot sleep",
            hint="Publish without wake=, or to engines that sleep only: .*--enable-sleep-mode, .*--enable-memory-saver",
        ).play()  # fmt: skip
    _published(engine)()


def test_shared_memory_that_cannot_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    from weightcast.transports import arena

    made = arena.Arena(64)

    def few(*_: object) -> int:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(arena.os, "open", few)
        Mistake(
            make=lambda: arena.map_arena(made.ref), error=TransportError, said="cannot open the shared memory of trainer process",
            hint="Ask for tcp",
        ).play()  # fmt: skip
    assert arena.map_arena(made.ref).numel() == 64
    made.close()
