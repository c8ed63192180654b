"""Hints about what is published: the mistake, the hint, and the hint followed."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save_file
from tests.support.mistakes import Mistake
from torch import nn

from weightcast import Publisher
from weightcast.errors import InvalidInput, StateError, Unsupported
from weightcast.integrations.deepspeed import gathered
from weightcast.layout.memory import Memory
from weightcast.sources import ModuleSource, SafetensorsSource, StreamSource, make_source
from weightcast.sources.adapter import adapter_named
from weightcast.sources.base import device_of
from weightcast.sources.streamed import _device_of as stream_device
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.trainer.ranks.other_rank import OtherRank
from weightcast.trainer.round.round import Round

VALUES = {"w": torch.randn(6, 4), "v": torch.randn(3)}


def _nested() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.randn(2), torch.randn(3)], layout=torch.jagged)


class FullyShardedDataParallel(nn.Module):
    """By the name of FSDP1's wrapper."""


def _with(value: torch.Tensor, **attributes: object) -> torch.Tensor:
    for name, attribute in attributes.items():
        setattr(value, name, attribute)
    return value


def _lazy() -> Mistake:
    module = nn.LazyLinear(3)

    def run_once() -> None:
        module(torch.ones(1, 2))
        make_source(module)

    return Mistake(
        make=lambda: make_source(module), error=Unsupported, said="lazy", hint="Run the module once", follow=run_once
    )


def _meta() -> Mistake:
    module = nn.Linear(2, 3, device="meta")

    def load() -> None:
        module.to_empty(device="cpu").load_state_dict(nn.Linear(2, 3).state_dict())
        make_source(module)

    return Mistake(
        make=lambda: make_source(module),
        error=Unsupported,
        said="meta device",
        hint=r"to_empty\(\) and load_state_dict",
        follow=load,
    )


def _memory() -> Mistake:
    source = ModuleSource(nn.Linear(4, 2))

    def rebind() -> None:
        source.rebind(Memory(tuple(torch.empty_like(storage) for storage in source.memory.storages)))

    def consolidate() -> None:
        source.consolidate()
        rebind()
        source.close()

    return Mistake(make=rebind, error=StateError, said="out of one arena", hint=r"consolidate\(\)", follow=consolidate)


SOURCES: dict[str, Callable[[], Mistake]] = {
    "no tensor": lambda: Mistake(
        make=lambda: make_source({"a": numpy.ones(2)}),  # type: ignore[dict-item]
        error=InvalidInput, said="'a' is no torch tensor", hint="torch.from_numpy",
        follow=lambda: make_source({"a": torch.from_numpy(numpy.ones(2))}),
    ),
    "lazy": _lazy,
    "meta": _meta,
    "ZeRO-3": lambda: Mistake(
        make=lambda: make_source({"a": _with(torch.empty(0), ds_shape=(3, 4))}), error=Unsupported,
        said=r"ZeRO-3 parameter: its values of shape \(3, 4\)", hint=r"Publisher\(lambda: gathered\(module\)",
        follow=lambda: make_source(lambda: gathered(nn.Linear(2, 3))),
    ),
    "dtype of a Source": lambda: Mistake(
        make=lambda: make_source(make_source(VALUES), dtype=torch.bfloat16), error=InvalidInput,
        said="no effect on a Source", hint="Leave it out", follow=lambda: make_source(make_source(VALUES)),
    ),
    "rename of a Source": lambda: Mistake(
        make=lambda: make_source(make_source(VALUES), rename={"w": "u"}), error=InvalidInput,
        said="no effect on a Source", hint="Rename what it is made of",
        follow=lambda: make_source(make_source(VALUES, rename={"w": "u"})),
    ),
    "dtype that is no number with a point": lambda: Mistake(
        make=lambda: make_source(VALUES, dtype=torch.int8), error=InvalidInput, said="floating-point type.*int8",
        hint="Use one of .*bfloat16", follow=lambda: make_source(VALUES, dtype=torch.bfloat16),
    ),
    "dtype without scales": lambda: Mistake(
        make=lambda: make_source(VALUES, dtype=torch.float8_e4m3fn), error=InvalidInput, said="without scales",
        hint="Leave dtype out and give the quantised tensors",
        follow=lambda: make_source({"w": VALUES["w"].to(torch.float8_e4m3fn), "w_scale": torch.ones(1)}),
    ),
    "a stream that was made": lambda: Mistake(
        make=lambda: make_source(iter(VALUES.items())), error=InvalidInput, said="can be read once",
        hint=r"StreamSource\(function\)\nOr give metadata=",
        follow=lambda: (
            make_source(StreamSource(lambda: iter(VALUES.items()))),
            make_source(StreamSource(metadata=[(name, value.dtype, value.shape) for name, value in VALUES.items()])),
        ),
    ),
    "a stream of arrays": lambda: Mistake(
        make=lambda: make_source(lambda: iter({"w": [1.0]}.items())), error=InvalidInput,  # type: ignore[arg-type, return-value]
        said="no torch tensor for 'w', but a list", hint="hold every tensor whole",
        follow=lambda: make_source(lambda: iter(VALUES.items())),
    ),
    "FSDP1": lambda: Mistake(
        make=lambda: make_source(FullyShardedDataParallel()), error=Unsupported, said="FSDP1", hint="fully_shard",
    ),
    "two devices": lambda: Mistake(
        make=lambda: device_of([torch.empty(1), torch.empty(1, device="meta")]), error=Unsupported,
        said="several devices.*cpu.*meta", hint="one trainer rank per device", follow=lambda: device_of([torch.empty(1)] * 2),
    ),
    "a tensor beside the module": lambda: Mistake(
        make=lambda: ModuleSource(nn.Linear(2, 2), names={"x": torch.ones(2)}), error=InvalidInput,
        said="'x' lies in no parameter", hint="Give a state dict", follow=lambda: make_source({"x": torch.ones(2)}),
    ),
    "an arena that is not there": _memory,
    "a nested tensor": lambda: Mistake(
        make=lambda: make_source({"a": _nested()}), error=Unsupported, said="'a' is a nested tensor",
        hint=r"one by one: unbind\(\)", follow=lambda: make_source({f"a.{i}": each for i, each in enumerate(_nested().unbind())}),
    ),
    "a stream on several GPUs": lambda: Mistake(
        make=lambda: stream_device({torch.device("cuda:0"), torch.device("cuda:1"), torch.device("cpu")}), error=Unsupported,
        said="lie on several GPUs: cuda:0, cuda:1", hint="Give device=, to which every tensor is copied",
        follow=lambda: make_source(StreamSource(lambda: iter(VALUES.items()), device="cpu")),
    ),
    "a stream on another rank only": lambda: Mistake(
        make=lambda: make_source(VALUES).exhaust(), error=StateError, said="this rank publishes no stream",
        hint="every rank the same kind of source", follow=lambda: make_source(lambda: iter(VALUES.items())).exhaust(),
    ),
    "an adapter of a plain module": lambda: Mistake(
        make=lambda: adapter_named(nn.Linear(2, 2), "policy"), error=InvalidInput, said="get_peft_model.* not for a Linear",
        hint="publish whole weights without adapter=", follow=lambda: make_source(nn.Linear(2, 2)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_what_cannot_be_published_as_it_is(name: str) -> None:
    SOURCES[name]().play()


# -- checkpoint folders


def _index(folder: Path, file: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": file}}))


def _not_a_file_of_the_folder(folder: Path) -> Mistake:
    _index(folder, "../w.bin")

    def again() -> None:
        save_file({"w": VALUES["w"]}, folder / "w.safetensors")
        _index(folder, "w.safetensors")
        SafetensorsSource(folder).close()

    return Mistake(
        make=lambda: SafetensorsSource(folder), error=InvalidInput, said="no safetensors file of the folder",
        hint="Make the index anew", follow=again,
    )  # fmt: skip


def _file_that_is_missing(folder: Path) -> Mistake:
    _index(folder, "w.safetensors")

    def complete() -> None:
        save_file({"w": VALUES["w"]}, folder / "w.safetensors")
        SafetensorsSource(folder).close()

    return Mistake(
        make=lambda: SafetensorsSource(folder), error=InvalidInput, said="w.safetensors.*not there",
        hint="Is the download complete", follow=complete,
    )  # fmt: skip


def _link_out_of_the_folder(folder: Path) -> Mistake:
    inner = folder / "inner"
    inner.mkdir()
    save_file({"w": VALUES["w"]}, folder / "w.safetensors")
    (inner / "model.safetensors").symlink_to(folder / "w.safetensors")
    return Mistake(
        make=lambda: SafetensorsSource(inner), error=InvalidInput, said="outside of the folder",
        hint="Publish the folder that the file lies in", follow=lambda: SafetensorsSource(folder).close(),
    )  # fmt: skip


def _device_that_is_none(folder: Path) -> Mistake:
    save_file({"w": VALUES["w"]}, folder / "w.safetensors")
    return Mistake(
        make=lambda: SafetensorsSource(folder, device="tpu"), error=InvalidInput, said="tpu",
        hint="Choose cpu or cuda", follow=lambda: SafetensorsSource(folder, device="cpu").close(),
    )  # fmt: skip


@pytest.mark.parametrize(
    "mistake", [_not_a_file_of_the_folder, _file_that_is_missing, _link_out_of_the_folder, _device_that_is_none]
)
def test_folders_that_are_no_checkpoint(mistake: Callable[[Path], Mistake], tmp_path: Path) -> None:
    mistake(tmp_path).play()


# -- between rounds


@pytest.fixture
def publish() -> Iterator[Callable[..., tuple[Publisher, LocalEngine]]]:
    made: list[Any] = []

    def publish(source: Any, **settings: Any) -> tuple[Publisher, LocalEngine]:
        model = DictModel({name: torch.zeros_like(value) for name, value in VALUES.items()})
        engine = LocalEngine(f"engine-{len(made)}", [model])
        publisher = Publisher(source, settings.pop("engines", [engine]), timeout_s=20, **settings)
        made.extend((publisher, engine))
        return publisher, engine

    yield publish
    for publisher, engine in zip(made[::2], made[1::2], strict=True):
        publisher.close()
        engine.stop()


def _fresh() -> dict[str, torch.Tensor]:
    return {name: torch.randn_like(value) for name, value in VALUES.items()}


def _mended(publisher: Publisher, engine: LocalEngine, values: Mapping[str, torch.Tensor]) -> None:
    """``connect()``, as the hint says, and every byte of the next round is there."""
    publisher.connect()
    assert publisher.publish().digests_match
    assert engine.models[0].holds({name: value.detach() for name, value in values.items()})


@pytest.mark.parametrize(
    ("change", "mend", "said"),
    [
        (lambda t: t.update(u=torch.ones(1)), lambda t: t.pop("u"), "'u' came into the mapping"),
        (lambda t: t.pop("v"), lambda t: t.update(v=torch.randn(3)), "'v' was published at connect.*is gone"),
        (lambda t: t.update(v=torch.randn(3).double()), None, r"'v' was float32 \(3,\).*is float64 \(3,\)"),
    ],
)
def test_a_mapping_of_another_form(
    publish: Callable[..., tuple[Publisher, LocalEngine]],
    change: Callable[[dict[str, torch.Tensor]], object],
    mend: Callable[[dict[str, torch.Tensor]], object] | None,
    said: str,
) -> None:
    tensors = _fresh()
    publisher, engine = publish(tensors)
    publisher.publish()
    change(tensors)
    Mistake(make=publisher.publish, error=StateError, said=said, hint=r"Call connect\(\) to publish the mapping").play()
    if mend is not None:
        mend(tensors)
    _mended(publisher, engine, {name: value.float() for name, value in tensors.items()})


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = (nn.Parameter(value) for value in _fresh().values())


def _replace(module: Two) -> None:
    module.v = nn.Parameter(torch.randn(3))


def _halve(module: Two) -> None:
    module.v.data = torch.randn(3).half()


@pytest.mark.parametrize(
    ("change", "said", "hint"),
    [
        (_replace, "'v' of the module was replaced", r"parameter\.copy_\(values\)\)\. Call connect\(\)"),
        (_halve, "parameters of the module were moved.*v", r"Call connect\(\) to publish the module as it is now"),
    ],
)
def test_a_module_of_other_tensors(
    publish: Callable[..., tuple[Publisher, LocalEngine]], change: Callable[[Two], None], said: str, hint: str
) -> None:
    module = Two()
    publisher, engine = publish(module)
    publisher.publish()
    change(module)
    Mistake(make=publisher.publish, error=StateError, said=said, hint=hint).play()
    _mended(publisher, engine, dict(module.named_parameters()))


def test_a_module_that_gained_and_lost_a_tensor(publish: Callable[..., tuple[Publisher, LocalEngine]]) -> None:
    module = Two()
    publisher, engine = publish(module)
    publisher.publish()
    module.u = nn.Parameter(torch.ones(1))
    hint = r"Call connect\(\) to publish the module as it is now"
    Mistake(make=publisher.publish, error=StateError, said="'u' came into the module", hint=hint).play()
    del module.u
    _mended(publisher, engine, dict(module.named_parameters()))
    del module.v
    Mistake(make=publisher.publish, error=StateError, said="'v' is gone from the module", hint=hint).play()
    module.v = nn.Parameter(torch.randn(3))
    _mended(publisher, engine, dict(module.named_parameters()))


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({"v": torch.randn(3).double()}, r"'v' was float32 \(3,\) in the first pass and is float64"),
        ({"u": torch.ones(1)}, "'u', which the first pass did not have"),
    ],
)
def test_a_stream_of_another_form(
    publish: Callable[..., tuple[Publisher, LocalEngine]], others: dict[str, torch.Tensor], said: str
) -> None:
    tensors = _fresh()
    publisher, engine = publish(lambda: iter(tensors.items()))
    publisher.publish()
    before = dict(tensors)
    tensors.update(others)
    Mistake(make=publisher.publish, error=StateError, said=said, hint=r"Call connect\(\) to have the stream").play()
    if "u" in tensors:
        tensors.clear()
        tensors.update(before)
    _mended(publisher, engine, {name: value.float() for name, value in tensors.items()})


def test_what_is_given_to_publish(publish: Callable[..., tuple[Publisher, LocalEngine]]) -> None:
    tensors = _fresh()
    held, _ = publish(tensors)
    form = [(name, value.dtype, value.shape) for name, value in tensors.items()]
    Mistake(
        make=partial(held.publish, 5), error=InvalidInput, said="a int is no stream",  # type: ignore[arg-type]
        hint=r"publish\(timeout_s=5\)", follow=lambda: held.publish(timeout_s=5),
    ).play()  # fmt: skip
    streamed, other = publish(StreamSource(metadata=form))

    def give_stream() -> None:
        assert streamed.publish(iter(tensors.items())).digests_match
        assert other.models[0].holds(tensors)

    Mistake(
        make=lambda: held.publish(iter(tensors.items())), error=StateError, said="takes no stream",
        hint="StreamSource in place of them", follow=give_stream,
    ).play()  # fmt: skip
    Mistake(
        make=streamed.publish, error=StateError, said="no stream to read", hint=r"publish\(stream\)", follow=give_stream
    ).play()


def test_prepare_where_values_are_copied(
    publish: Callable[..., tuple[Publisher, LocalEngine]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU there is nothing to prepare for any source; this one says that it is on a GPU."""
    publisher, _ = publish(_fresh())
    module, _ = publish(Two())
    for each in (publisher, module):
        monkeypatch.setattr(each._source, "device", torch.device("cuda"))
    Mistake(
        make=publisher.prepare, error=Unsupported, said="nothing to prepare", hint="Leave prepare.. out, or publish a module without adapters",
        follow=module.prepare,
    ).play()  # fmt: skip


def test_a_fleet_that_is_not_as_the_caller_thinks(publish: Callable[..., tuple[Publisher, LocalEngine]]) -> None:
    tensors = _fresh()
    publisher, engine = publish(tensors, engines=[])
    Mistake(
        make=publisher.publish, error=StateError, said="no engine", hint=r"engines= or call add\(\)",
        follow=lambda: (publisher.add(engine), publisher.publish()),
    ).play()  # fmt: skip
    assert engine.models[0].holds(tensors)
    Mistake(
        make=lambda: publisher.remove(3), error=InvalidInput, said="by its name, not by 3", hint="a name of members",  # type: ignore[arg-type]
        follow=lambda: publisher.members[engine.name],
    ).play()  # fmt: skip
    Mistake(
        make=lambda: publisher.remove("nobody"), error=StateError, said="'nobody' is not in the fleet",
        hint=f"Engines: {engine.name}$",
    ).play()  # fmt: skip
    Mistake(
        make=lambda: publisher.add(engine), error=StateError, said="in the fleet already",
        hint=r"remove\(\) it to add it anew", follow=lambda: (publisher.remove(engine.name), publisher.add(engine)),
    ).play()  # fmt: skip
    tensors["w"].copy_(torch.randn(6, 4))
    publisher.publish()
    assert engine.models[0].holds(tensors)


def test_values_of_a_stream_are_not_looked_at(publish: Callable[..., tuple[Publisher, LocalEngine]]) -> None:
    tensors = _fresh()

    def yields() -> Iterator[tuple[str, torch.Tensor]]:
        for name, value in tensors.items():
            if not bool(value.isfinite().all()):
                raise ValueError(f"{name} has values that are not finite")
            yield name, value

    publisher, _ = publish(yields, check_finite=True)
    checking, engine = publish(yields)

    def check_before() -> None:
        tensors["w"][random.randrange(6), 0] = float("nan")
        with pytest.raises(Exception, match="w has values that are not finite"):
            checking.publish()
        tensors["w"].copy_(torch.randn(6, 4))
        checking.publish()
        assert engine.models[0].holds(tensors)

    Mistake(
        make=publisher.connect, error=Unsupported, said="check_finite for a stream", hint="before the stream yields them",
        follow=check_before,
    ).play()  # fmt: skip


def test_what_only_the_first_rank_knows() -> None:
    publisher: Any = SimpleNamespace(_part=OtherRank.__new__(OtherRank))
    Mistake(
        make=lambda: Publisher._first_rank(publisher, "members"), error=StateError, said="this rank knows no members",
        hint="Ask trainer rank 0",
    ).play()  # fmt: skip


def test_a_round_that_the_end_of_the_program_overtakes(
    publish: Callable[..., tuple[Publisher, LocalEngine]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the main thread has ended, Python begins no thread: what needs one fails."""
    tensors = _fresh()
    publisher, engine = publish(tensors)
    publisher.publish()

    def no_thread(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread at interpreter shutdown")

    def overtaken() -> None:
        ended = threading.Thread(target=lambda: None)
        with monkeypatch.context() as patch:
            patch.setattr("weightcast.trainer.publishing.threading.main_thread", lambda: ended)
            patch.setattr(Round, "run", no_thread)
            publisher.publish(wait=False).wait()

    def waited_for() -> None:
        tensors["w"].copy_(torch.randn(6, 4))
        assert publisher.publish(wait=False).wait().digests_match
        assert engine.models[0].holds(tensors)

    Mistake(
        make=overtaken, error=StateError, said="the program ended before the round",
        hint=r"Call wait\(\) of what publish\(\) returned", follow=waited_for,
    ).play()  # fmt: skip
