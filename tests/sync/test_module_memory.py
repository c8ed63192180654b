"""A published module is the user's: what saves, copies or computes with it does what it did before, and after close() nothing is shared."""

from __future__ import annotations

import copy
import io
import os
import pickle
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from safetensors.torch import save_file, save_model
from torch import nn
from transformers import AutoModelForCausalLM

from weightcast import Publisher
from weightcast.errors import InvalidInput, PlanMismatch, StateError, TransportError, WeightcastError
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.testing.models import build_tiny_model
from weightcast.transports.shm import ShmTransport


class Odd(nn.Module):
    """Tied weights, views of one storage, parameters that are not contiguous, 0-d and empty tensors, several element types."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(33, 20)
        self.head = nn.Linear(20, 33, bias=False)
        self.head.weight = self.embed.weight
        both = torch.empty(2, 7, 5)
        self.first, self.second = nn.Parameter(both[0]), nn.Parameter(both[1])
        self.turned = nn.Parameter(torch.empty(6, 4).t())
        self.scale = nn.Parameter(torch.empty(()))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.brief = nn.Parameter(torch.empty(9, dtype=torch.bfloat16))
        self.register_buffer("steps", torch.empty((), dtype=torch.int64))
        self.register_buffer("eight", torch.empty(11, 3, dtype=torch.uint8).view(torch.float8_e4m3fn))
        self.register_buffer("scratch", torch.empty(5), persistent=False)


@torch.no_grad()
def randomise(*modules: nn.Module) -> None:
    """Fresh random values, the same in all modules."""
    seed = int(torch.randint(2**31, ()))
    for module in modules:
        generator = torch.Generator().manual_seed(seed)
        for value in module.state_dict().values():
            values = torch.randn(value.shape, generator=generator) * 9
            value.copy_(values.to(value.dtype))


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def raw(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {
        name: value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, value in tensors.items()
    }


def storage_groups(module: nn.Module) -> list[list[str]]:
    """Names of tensors by the storage that they share."""
    groups: dict[int, list[str]] = {}
    for name, value in module.state_dict().items():
        if value.numel():
            groups.setdefault(value.untyped_storage().data_ptr(), []).append(name)
    return sorted(groups.values())


def files_of(write: Callable[[Path], object]) -> dict[str, bytes]:
    """What is in the files that a call writes into a folder."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def outcome(write: Callable[[Path], object]) -> dict[str, bytes] | str:
    """What is in the files that a call writes, or what it says instead: some libraries refuse views that are larger than themselves."""
    try:
        return files_of(write)
    except RuntimeError as error:
        return str(error)


def torch_saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def check_as_before(module: nn.Module, twin: nn.Module) -> None:
    """Whatever saves or copies the module gives the bytes that it gives of a twin which was never published."""
    assert raw(module.state_dict()) == raw(twin.state_dict())
    assert storage_groups(module) == storage_groups(twin)
    assert torch_saved(module.state_dict()) == torch_saved(twin.state_dict())
    for name, value in module.state_dict().items():
        other = twin.state_dict()[name]
        assert torch_saved(value) == torch_saved(other), name
        assert len(pickle.dumps(value)) < len(pickle.dumps(other)) + 10, name  # numbers of storages are addresses
        assert (value.stride(), value.storage_offset()) == (other.stride(), other.storage_offset())
    assert len(pickle.dumps(module)) < len(pickle.dumps(twin)) + 100
    assert outcome(lambda p: save_model(module, str(p / "m"))) == outcome(lambda p: save_model(twin, str(p / "m")))
    for part, other in zip(module.children(), twin.children(), strict=True):
        tensors, others = part.state_dict(), other.state_dict()
        assert files_of(lambda p, t=tensors: save_file(t, p / "m")) == files_of(
            lambda p, t=others: save_file(t, p / "m")
        )
    copied = copy.deepcopy(module)
    assert raw(copied.state_dict()) == raw(twin.state_dict())
    assert storage_groups(copied) == storage_groups(copy.deepcopy(twin))
    pointers = {value.untyped_storage().data_ptr() for value in module.state_dict().values() if value.numel()}
    assert not pointers & {v.untyped_storage().data_ptr() for v in copied.state_dict().values() if v.numel()}
    sizes = [v.untyped_storage().nbytes() for v in copied.state_dict().values()]
    assert sizes == [v.untyped_storage().nbytes() for v in copy.deepcopy(twin).state_dict().values()]


def check_distributed_checkpoint(module: nn.Module) -> None:
    with tempfile.TemporaryDirectory() as folder:
        dcp.save(dict(module.state_dict()), checkpoint_id=folder)
        loaded = {name: torch.zeros_like(value) for name, value in module.state_dict().items()}
        dcp.load(loaded, checkpoint_id=folder)
        nbytes = sum(path.stat().st_size for path in Path(folder).rglob("*"))
    assert raw(loaded) == raw(module.state_dict())
    assert nbytes < sum(value.nbytes for value in loaded.values()) + 40_000


@pytest.fixture
def engine() -> Iterator[LocalEngine]:
    torch.manual_seed(torch.seed())
    module = Odd()
    randomise(module)
    made = LocalEngine("a", [DictModel(state(module))])
    yield made
    made.stop()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_saving_and_copying_give_what_they_gave_before(engine: LocalEngine, transport: str) -> None:
    module, twin = Odd(), Odd()
    randomise(module, twin)
    check_as_before(module, twin)
    with Publisher(module, [engine], transport=transport, timeout_s=30) as publisher:
        check_as_before(module, twin)
        for _ in range(3):
            randomise(module, twin)
            publisher.publish()
            assert engine.models[0].holds(state(module))
            check_as_before(module, twin)
            check_distributed_checkpoint(module)
            randomise(module, twin)
            check_as_before(module, twin)
    check_as_before(module, twin)
    randomise(module, twin)
    check_as_before(module, twin)
    check_distributed_checkpoint(module)


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_models_save_what_they_saved_before(tmp_path: Path, tied: bool) -> None:
    folder = build_tiny_model(tmp_path / "model", "qwen3", tied=tied)
    module, twin = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    engine = LocalEngine("a", [DictModel(state(module))])

    def check() -> None:
        assert files_of(module.save_pretrained) == files_of(twin.save_pretrained)
        assert files_of(lambda p: save_model(module, str(p / "m"))) == files_of(
            lambda p: save_model(twin, str(p / "m"))
        )
        assert torch_saved(module.state_dict()) == torch_saved(twin.state_dict())
        assert len(pickle.dumps(module.lm_head.weight)) < len(pickle.dumps(twin.lm_head.weight)) + 10

    try:
        check()
        with Publisher(module, [engine], transport="shm", timeout_s=30) as publisher:
            for _ in range(2):
                randomise(module, twin)
                publisher.publish()
                assert engine.models[0].holds(state(module))
                check()
        randomise(module, twin)
        check()
    finally:
        engine.stop()


def test_accelerate_saves_and_loads_every_tensor(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    module, twin = (AutoModelForCausalLM.from_pretrained(build_tiny_model(tmp_path / "m", "qwen3")) for _ in range(2))
    module = accelerator.prepare(module)
    randomise(module, twin)
    engine = LocalEngine("a", [DictModel(state(module))])

    def check() -> None:
        def saved(model: nn.Module) -> dict[str, bytes]:
            return files_of(lambda p: accelerator.save_model(model, p))

        assert saved(module) == saved(twin)
        with tempfile.TemporaryDirectory() as folder:
            accelerator.save_state(folder)
            kept = state(module)
            randomise(module)
            accelerator.load_state(folder)
        assert raw(module.state_dict()) == raw(kept)

    try:
        with Publisher(module, [engine], transport="shm", timeout_s=30) as publisher:
            for _ in range(2):
                randomise(module, twin)
                publisher.publish()
                assert engine.models[0].holds(state(module))
                check()
                publisher.publish()
                assert engine.models[0].holds(state(module))
        check()
    finally:
        engine.stop()


def mapped_of_memfds() -> int:
    return sum("memfd:weightcast" in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_closed_publisher_leaves_ordinary_tensors(engine: LocalEngine, transport: str) -> None:
    """Also where one of them was moved, replaced or given other values in between."""
    module = Odd()
    randomise(module)
    before = mapped_of_memfds()
    with Publisher(module, [engine], transport=transport, timeout_s=30) as publisher:
        publisher.publish()
        engine.stop()
        assert mapped_of_memfds() - before == (transport == "shm")
        moved = torch.randn(33, 20)
        module.embed.weight.data = moved
        kept = module.turned
        module.turned = nn.Parameter(torch.randn(4, 6))
        expected = state(module)
    for value in (module.first, module.scale, module.brief, module.steps, module.eight):
        assert value.untyped_storage().resizable()
    assert raw(module.state_dict()) == raw(expected)
    assert module.embed.weight.data_ptr() == moved.data_ptr()
    assert kept.untyped_storage().resizable()
    assert mapped_of_memfds() == before


def test_what_something_else_refers_to_is_not_moved_away_from_it(
    engine: LocalEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """A flat buffer that an optimizer writes to, and a state dict that is kept, go on being the module's own values."""
    module = Odd()
    randomise(module)
    flat = torch.randn(20 * 33)
    module.embed.weight.data = flat.view(33, 20)
    kept = module.second.detach()
    with Publisher(module, [engine], transport="shm", timeout_s=30) as publisher:
        for _ in range(3):
            flat.copy_(torch.randn(flat.shape))
            kept.copy_(torch.randn(kept.shape))
            publisher.publish()
            assert torch.equal(module.head.weight, flat.view(33, 20))
            assert torch.equal(module.second, kept)
            assert engine.models[0].holds(state(module))
        assert module.embed.weight.data_ptr() == flat.data_ptr()
        flat.untyped_storage().resize_(0)
        with pytest.raises(StateError, match=r"moved since connect\(\): 'embed\.weight'"):
            publisher.publish()
    told = [text for text in caplog.messages if "not moved" in text]
    assert len(told) == 1
    assert "copied in each round: 'first', 'second', 'embed.weight'." in told[0]


def test_what_another_process_writes_is_published(caplog: pytest.LogCaptureFixture) -> None:
    """share_memory() before a Publisher, as actors that share a policy do."""
    module = nn.Linear(20, 33)
    module.share_memory()
    engine = LocalEngine("a", [DictModel(state(module))], mode="staged")
    told, tells = os.pipe()
    if not (child := os.fork()):
        try:
            while number := os.read(told, 1):
                module.weight.data.copy_(torch.full((33, 20), float(number[0])))
                module.bias.data.add_(1)
                os.kill(os.getpid(), signal.SIGSTOP)
        finally:
            os._exit(0)
    try:
        with Publisher(module, [engine], timeout_s=30) as publisher:
            for number in (3, 7, 9):
                publisher.publish()
                before = module.bias.detach().clone()
                os.write(tells, bytes([number]))
                os.waitpid(child, os.WUNTRACED)
                assert bool((module.weight == number).all())
                assert torch.equal(module.bias, before + 1)
                os.kill(child, signal.SIGCONT)
                publisher.publish()
                assert engine.models[0].holds(state(module))
            assert module.weight.is_shared()
        assert module.weight.is_shared()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(told)
        os.close(tells)
        engine.stop()
    assert "copied in each round: 'weight', 'bias'." in caplog.text


def test_a_file_that_others_map_goes_on_being_the_parameter(tmp_path: Path) -> None:
    path = str(tmp_path / "weights")
    module = nn.Linear(20, 33, bias=False)
    torch.from_file(path, shared=True, size=660).copy_(module.weight.detach().flatten())
    module.weight.data = torch.from_file(path, shared=True, size=660).view(33, 20)
    engine = LocalEngine("a", [DictModel(state(module))], mode="staged")
    with Publisher(module, [engine], timeout_s=30) as publisher:
        for _ in range(3):
            publisher.publish()
            torch.from_file(path, shared=True, size=660).copy_(torch.randn(660))
            publisher.publish()
            assert engine.models[0].holds({"weight": torch.from_file(path, shared=True, size=660).view(33, 20)})
    engine.stop()


def test_private_mappings_of_checkpoints_move(tmp_path: Path) -> None:
    """As transformers and torch.load(mmap=True) leave them: nobody else sees what is written there."""
    path = tmp_path / "weights.pt"
    torch.save({"weight": torch.randn(33, 20)}, path)
    module = nn.Linear(20, 33, bias=False)
    module.load_state_dict(torch.load(path, mmap=True), assign=True)
    engine = LocalEngine("a", [DictModel(state(module))], mode="staged")
    with Publisher(module, [engine], timeout_s=30) as publisher:
        assert publisher.publish().own_nbytes == 0
        randomise(module)
        publisher.publish()
        assert engine.models[0].holds(state(module))
    engine.stop()


def test_connecting_anew_leaves_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    """The source that was before, and the one that was made to be looked at, refer to no tensor that moves."""
    module = nn.Sequential(nn.Linear(33, 65), nn.Linear(65, 7), nn.Linear(7, 3))
    engine = LocalEngine("a", [DictModel(state(module))], mode="staged")
    with Publisher(module, [engine], timeout_s=30) as publisher:
        publisher.publish()
        for number in range(3):
            module[number] = nn.Linear(*reversed(module[number].weight.shape))
            publisher.connect()
            randomise(module)
            assert publisher.publish().own_nbytes == 0
            assert engine.models[0].holds(state(module))
    engine.stop()
    assert "not moved" not in caplog.text


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_tensors_that_were_moved_come_back_into_the_arena_unless_what_they_left_is_still_used(
    engine: LocalEngine, transport: str
) -> None:
    """An average of weights is swapped in for a round and out again: nobody writes to the weights that were put aside."""
    module = Odd()
    alone = {name: value for name, value in module.state_dict(keep_vars=True).items() if value.numel()}
    values = [value for name, value in alone.items() if name not in ("first", "second")]  # these two are one storage
    randomise(module)
    with Publisher(module, [engine], transport=transport, timeout_s=30) as publisher:
        publisher.publish()
        memory, places = publisher._part._source.memory, [value.data_ptr() for value in values]  # type: ignore[union-attr]
        for number in range(3):
            for value in values[number:]:
                value.data = value.data.clone()
            randomise(module)
            expected = raw(module.state_dict())
            assert publisher.publish().digests_match
            assert raw(module.state_dict()) == expected
            assert engine.models[0].holds(state(module))
            assert publisher._part._source.memory is memory  # type: ignore[union-attr]
            assert [value.data_ptr() for value in values] == places
        trained = [value.data for value in values]
        before = [value.clone() for value in trained]
        for value in values:
            value.data = value.data.clone()
        randomise(module)
        expected = raw(module.state_dict())
        assert publisher.publish().digests_match
        assert engine.models[0].holds(state(module))
        assert raw(module.state_dict()) == expected
        assert raw(dict(enumerate(trained))) == raw(dict(enumerate(before)))
        for value, former in zip(values, trained, strict=True):
            value.data = former
        assert publisher.publish().digests_match
        assert engine.models[0].holds(state(module))
        assert raw(dict(enumerate(trained))) == raw(dict(enumerate(before)))


def test_a_publisher_that_could_not_be_made_or_connected_leaves_the_module_as_it_was(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, twin = Odd(), Odd()
    randomise(module, twin)
    places = [value.data_ptr() for value in module.state_dict().values()]
    with pytest.raises(InvalidInput):
        Publisher(module, [engine], mode="sideways", timeout_s=10)  # type: ignore[arg-type]
    with Publisher(module, ["http://127.0.0.1:9"], timeout_s=5) as publisher, pytest.raises(WeightcastError):
        publisher.publish()
    with Publisher(nn.Linear(2, 2), [engine], timeout_s=10) as publisher, pytest.raises(PlanMismatch):
        publisher.connect()
    assert [value.data_ptr() for value in module.state_dict().values()] == places

    def refuse(*args: object, **more: object) -> None:
        raise TransportError("no pair today")

    with Publisher(module, [engine], transport="shm", timeout_s=10) as publisher:
        with monkeypatch.context() as patched:
            patched.setattr(ShmTransport, "trainer_ends", refuse)
            with pytest.raises(TransportError, match="no pair today"):
                publisher.connect()
        check_as_before(module, twin)
        randomise(module, twin)
        publisher.publish()
        assert engine.models[0].holds(state(twin))
    check_as_before(module, twin)


def test_a_close_from_another_thread_ends_a_round_and_leaves_the_values(engine: LocalEngine) -> None:
    module, twin = Odd(), Odd()
    reached, go_on = threading.Event(), threading.Event()

    def wait_in_commit(phase: str) -> None:
        if phase == "commit":
            reached.set()
            assert go_on.wait(20)

    publisher = Publisher(module, [engine], transport="shm", timeout_s=10)
    publisher.publish()
    randomise(module, twin)
    engine.before = wait_in_commit
    errors: list[Exception] = []

    def publish() -> None:
        try:
            publisher.publish()
        except WeightcastError as error:
            errors.append(error)

    thread = threading.Thread(target=publish)
    thread.start()
    assert reached.wait(20)
    closer = threading.Thread(target=publisher.close)
    closer.start()
    time.sleep(0.2)
    go_on.set()
    closer.join(20)
    thread.join(20)
    assert not closer.is_alive()
    assert not thread.is_alive()
    check_as_before(module, twin)
    with pytest.raises(StateError, match="closed"):
        publisher.publish()


def test_aliases_that_are_made_between_rounds_stay_aliases(engine: LocalEngine) -> None:
    module = Odd()
    randomise(module)
    with Publisher(module, [engine], transport="shm", timeout_s=30) as publisher:
        publisher.publish()
        kept = module.state_dict()
        with torch.no_grad():
            kept["brief"].copy_(torch.randn(9))
        publisher.publish()
        assert engine.models[0].holds(state(module))
    randomise(module)
    assert raw(kept) == raw(module.state_dict())


def test_training_goes_on_where_the_first_round_was_in_inference_mode(engine: LocalEngine) -> None:
    module = Odd()
    randomise(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with torch.inference_mode():
        publisher = Publisher(module, [engine], transport="shm", timeout_s=30)
        publisher.publish()
    for closes in (False, True):
        before = state(module)
        optimizer.zero_grad()
        module.head(module.embed(torch.arange(5))).square().sum().backward()
        optimizer.step()
        assert not torch.equal(before["head.weight"], module.head.weight)
        if closes:
            break
        publisher.publish()
        assert engine.models[0].holds(state(module))
        with torch.inference_mode():
            publisher.close()
