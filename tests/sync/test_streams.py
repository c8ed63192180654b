"""Streams: an iterator of names and tensors, read once in each round through windows. Every byte arrives, or the error says which
tensor was at fault, and engines are unharmed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch

from weightcast import Publisher
from weightcast.errors import InvalidInput, RoundFailed, StateError, Unsupported
from weightcast.sources import StreamSource
from weightcast.testing.local_engine import DictModel, LocalEngine

SHAPES = {
    "z.first": (70, 33),
    "b.small": (5,),
    "a.large": (300, 41),
    "m.none": (0, 4),
    "c.scalar": (),
    "y.last": (64, 64),
}
"""In the order of the stream, which is not that of names. The windows of the tests hold less than the largest."""
WINDOW_NBYTES = 4 * 16 * 1024
TIMEOUT_S = 20.0

Tensors = dict[str, torch.Tensor]


def fresh() -> Tensors:
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


def poisoned(values: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    """One buffer for all tensors, which is NaN before and after the time in which a tensor may be read."""
    buffer = torch.empty(max(value.numel() for value in values.values()))
    for name, value in values.items():
        tensor = buffer[: value.numel()].view(value.shape)
        tensor.copy_(value)
        yield name, tensor
        buffer.fill_(torch.nan)


class Run(NamedTuple):
    publisher: Publisher
    models: list[DictModel]
    engine: LocalEngine


@pytest.fixture
def start(request: pytest.FixtureRequest) -> Callable[..., Run]:
    """Starts a publisher of a source and an engine of several workers; both are closed after the test."""

    def make(source: Any, *, workers: int = 1, dtype: torch.dtype = torch.float32, **settings: Any) -> Run:
        form = {name: torch.zeros(shape, dtype=dtype) for name, shape in SHAPES.items()}
        models = [DictModel(form, rows=(rank, workers)) for rank in range(workers)]
        engine = LocalEngine(
            settings.pop("name", "local"), models, mode=settings.pop("mode", "staged"), side_by_side=True
        )
        request.addfinalizer(engine.stop)
        publisher = Publisher(source, [engine], timeout_s=TIMEOUT_S, **settings)
        request.addfinalizer(publisher.close)
        return Run(publisher, models, engine)

    return make


@pytest.mark.parametrize("transport", ["shm", "tcp", "tls"])
@pytest.mark.parametrize("workers", [1, 2])
def test_one_buffer_that_is_nan_around_each_yield_arrives_exactly(
    start: Callable[..., Run], transport: str, workers: int
) -> None:
    values: Tensors = {}
    source = StreamSource(lambda: poisoned(values or fresh()), window_nbytes=WINDOW_NBYTES)
    run = start(source, workers=workers, transport=transport)
    for _ in range(4):
        values.clear()
        values.update(fresh())
        report = run.publisher.publish()
        assert report.digests_match
        assert {each.transport for each in report.engines[0].workers} == {transport}
        assert all(model.holds(values) for model in run.models)
    source_of = run.publisher._part._source  # type: ignore[union-attr]
    assert len(source_of.memory.storages) > source_of.slots, "memory is used again"


def as_given(values: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    yield from values.items()


def test_what_the_engine_and_the_published_type_round_is_what_a_state_dict_would_give(
    start: Callable[..., Run],
) -> None:
    values = fresh()
    source = StreamSource(lambda: poisoned(values), window_nbytes=WINDOW_NBYTES)
    run = start(source, dtype=torch.float64, workers=2)
    narrow = start(source, dtype=torch.float16, name="narrow")
    narrow.publisher.close()
    run.publisher.add(narrow.engine)
    assert run.publisher.publish().digests_match
    assert all(model.holds(values) for model in (*run.models, *narrow.models))
    rounded = start(lambda: poisoned(values), dtype=torch.float32)
    rounded.publisher.close()
    with Publisher(source, [rounded.engine], dtype=torch.bfloat16, timeout_s=TIMEOUT_S) as publisher:
        assert publisher.publish().digests_match
        assert publisher._part._source.manifest["b.small"].dtype == "bfloat16"  # type: ignore[union-attr]
    assert rounded.models[0].holds({name: value.bfloat16() for name, value in values.items()})


def test_a_stream_and_a_state_dict_of_the_same_values_are_the_same_version(start: Callable[..., Run]) -> None:
    values = fresh()
    streamed, whole = start(lambda: as_given(values)), start(values)
    first, second = streamed.publisher.publish(), whole.publisher.publish()
    assert (first.digest, first.version) == (second.digest, second.version)


def test_each_round_may_be_given_its_iterator(start: Callable[..., Run]) -> None:
    form = [(name, torch.float32, shape) for name, shape in SHAPES.items()]
    run = start(StreamSource(metadata=form, window_nbytes=WINDOW_NBYTES))
    for _ in range(3):
        values = fresh()
        assert run.publisher.publish(poisoned(values)).digests_match
        assert run.models[0].holds(values)
    with pytest.raises(StateError, match="no stream to read") as caught:
        run.publisher.publish()
    assert "publish(stream)" in str(caught.value.hint)
    assert run.models[0].holds(values)


class Repeatable:
    """As vLLM's WeightSource: it can be iterated again and again, and says what it yields."""

    def __init__(self, values: Tensors) -> None:
        self.values, self.passes = values, 0

    def metadata(self) -> list[Any]:
        class Meta(NamedTuple):
            name: str
            dtype: torch.dtype
            shape: tuple[int, ...]

        return [Meta(name, value.dtype, tuple(value.shape)) for name, value in self.values.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.passes += 1
        yield from poisoned(self.values)


def test_a_source_that_says_its_form_is_read_in_rounds_only(start: Callable[..., Run]) -> None:
    source = Repeatable(fresh())
    run = start(source)
    run.publisher.connect()
    assert source.passes == 0
    for number in (1, 2):
        source.values = fresh()
        run.publisher.publish()
        assert source.passes == number
        assert run.models[0].holds(source.values)


def test_names_are_those_of_the_engine_where_rename_says_so(start: Callable[..., Run]) -> None:
    values = fresh()
    run = start(lambda: ((f"model.{name}", value) for name, value in poisoned(values)), rename={"model.": ""})
    run.publisher.publish()
    assert run.models[0].holds(values)


Spoil = Callable[[Tensors], Iterator[tuple[str, Any]]]


def _raises(values: Tensors) -> Iterator[tuple[str, Any]]:
    for name, tensor in poisoned(values):
        if name == "m.none":
            raise ZeroDivisionError("the trainer's own")
        yield name, tensor


def _replaced(key: str, item: tuple[str, Any] | None) -> Spoil:
    def spoiled(values: Tensors) -> Iterator[tuple[str, Any]]:
        for name, tensor in poisoned(values):
            if name != key:
                yield name, tensor
            elif item is not None:
                yield item

    return spoiled


SPOILT: dict[str, tuple[Spoil, type[Exception], str]] = {
    "raises": (_raises, ZeroDivisionError, "the trainer's own"),
    "ends early": (_replaced("y.last", None), StateError, r"ended before 'y\.last', after 5 of 6 tensors"),
    "leaves one out": (_replaced("m.none", None), StateError, r"'c\.scalar' where 'm\.none' was due"),
    "twice": (_replaced("c.scalar", ("b.small", torch.zeros(5))), StateError, r"'b\.small' twice"),
    "stranger": (
        _replaced("c.scalar", ("new", torch.zeros(5))),
        StateError,
        "'new', which the first pass did not have",
    ),
    "shape": (
        _replaced("y.last", ("y.last", torch.zeros(64, 65))),
        StateError,
        r"'y\.last' was float32 \(64, 64\) in the first pass and is float32 \(64, 65\)",
    ),
    "dtype": (
        _replaced("y.last", ("y.last", torch.zeros(64, 64).half())),
        StateError,
        r"'y\.last' was float32 .* is float16",
    ),
    "one more": (lambda values: iter([*values.items(), ("over", torch.zeros(1))]), StateError, "'over', which"),
    "no tensor": (_replaced("y.last", ("y.last", None)), InvalidInput, r"no torch tensor for 'y\.last'"),
    "no pair": (lambda values: iter([torch.zeros(3)]), InvalidInput, "pairs of name and tensor, not a Tensor"),
    "sparse": (_replaced("y.last", ("y.last", torch.zeros(64, 64).to_sparse())), Unsupported, r"'y\.last'"),
}


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_stream_that_does_not_agree_is_a_named_error_and_harms_no_engine(
    start: Callable[..., Run], transport: str
) -> None:
    values, now = fresh(), {"stream": poisoned}
    run = start(StreamSource(lambda: now["stream"](values), window_nbytes=WINDOW_NBYTES), transport=transport)
    version = run.publisher.publish().version
    for kind, (spoilt, error, text) in SPOILT.items():
        served, values = values, fresh()
        now["stream"] = spoilt
        with pytest.raises(error, match=text):
            run.publisher.publish()
        assert run.models[0].holds(served), kind
        assert run.publisher.versions == {"local": version}, kind
        now["stream"] = poisoned
        report = run.publisher.publish()
        assert report.digests_match, kind
        version = report.version
        assert run.models[0].holds(values), kind


def test_a_stream_of_another_form_is_taken_up_by_connect(start: Callable[..., Run]) -> None:
    values = fresh()
    run = start(lambda: poisoned(values))
    run.publisher.publish()
    values = {name: value.half() for name, value in fresh().items()}

    def halves() -> Iterator[tuple[str, torch.Tensor]]:
        yield from values.items()

    now = {"stream": halves}
    run.publisher.close()
    with Publisher(lambda: now["stream"](), [run.engine], timeout_s=TIMEOUT_S) as publisher:
        publisher.publish()
        wide = fresh()
        now["stream"] = lambda: poisoned(wide)
        with pytest.raises(StateError, match="was float16") as caught:
            publisher.publish()
        assert "connect()" in str(caught.value.hint)
        publisher.connect()
        assert publisher.publish().digests_match
        assert run.models[0].holds(wide)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: iter([("w", torch.zeros(1))]), InvalidInput, "can be read once, and every round reads it"),
        (lambda: StreamSource(), InvalidInput, "needs its form before"),
        (lambda: lambda: iter(()), InvalidInput, "yields nothing"),
        (lambda: lambda: iter([("w", torch.zeros(1)), ("w", torch.zeros(1))]), InvalidInput, "'w' twice"),
        (lambda: StreamSource(dict, window_nbytes=10), InvalidInput, "window_nbytes is a number of at least 1024"),
        (lambda: StreamSource(dict, metadata=[("w", "float32")]), InvalidInput, "name, dtype and shape"),
        (lambda: torch.nn.Linear, InvalidInput, "cannot publish a type"),
    ],
    ids=["spent", "formless", "empty", "twice", "window", "metadata", "class"],
)
def test_what_is_no_stream_of_rounds_is_refused(make: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Publisher(make(), [])


def test_a_publisher_of_tensors_takes_no_stream(start: Callable[..., Run]) -> None:
    values = fresh()
    run = start(values)
    with pytest.raises(StateError, match="takes no stream"):
        run.publisher.publish(as_given(values))
    with pytest.raises(InvalidInput, match="publish\\(timeout_s=5\\)"):
        run.publisher.publish(5)  # type: ignore[arg-type]
    assert run.publisher.publish().digests_match


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_an_engine_without_a_staged_copy_reads_the_stream_in_its_commit(
    start: Callable[..., Run], transport: str
) -> None:
    values, readings = fresh(), list[bool]()

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        readings.append(True)
        return poisoned(values)

    form = [(name, torch.float32, shape) for name, shape in SHAPES.items()]
    source = StreamSource(stream, window_nbytes=WINDOW_NBYTES, metadata=form)
    run = start(source, workers=2, mode="in_place", transport=transport)
    staged = start(source, name="staged")
    staged.publisher.close()
    for number in (1, 2, 3):
        if number == 3:
            run.publisher.add(staged.engine)
        values = fresh()
        report = run.publisher.publish()
        assert report.digests_match
        assert all(model.holds(values) for model in run.models)
        assert len(readings) == 2 * number, "once for its digest, once for the engine"
    assert staged.models[0].holds(values)
    with pytest.raises(Unsupported, match="can be read once") as caught:
        run.publisher.publish(poisoned(fresh()))
    assert "mode='staged'" in str(caught.value.hint)
    assert all(model.holds(values) for model in (*run.models, *staged.models))
    values = fresh()
    assert run.publisher.publish().digests_match
    assert all(model.holds(values) for model in (*run.models, *staged.models))


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("kind", ["raises", "ends early", "shape"])
def test_a_stream_that_fails_only_when_an_engine_stands_still_names_it_as_dirty_and_heals(
    start: Callable[..., Run], transport: str, kind: str
) -> None:
    values, spoilt, readings = fresh(), set[int](), list[bool]()

    def stream() -> Iterator[tuple[str, Any]]:
        readings.append(True)
        return SPOILT[kind][0](values) if len(readings) in spoilt else poisoned(values)

    form = [(name, torch.float32, shape) for name, shape in SHAPES.items()]
    source = StreamSource(stream, window_nbytes=WINDOW_NBYTES, metadata=form)
    run = start(source, mode="in_place", transport=transport)
    run.publisher.publish()
    served, values = values, fresh()
    spoilt.add(len(readings) + 1)
    with pytest.raises(SPOILT[kind][1]):
        run.publisher.publish()
    assert run.models[0].holds(served), "the reading for the digest failed before any engine was touched"
    spoilt.add(len(readings) + 2)
    with pytest.raises(RoundFailed) as caught:
        run.publisher.publish()
    if caught.value.dirty != ("local",):
        # What was sent may still have been on its way when the commit was called off.
        assert (caught.value.dirty, transport) == ((), "tcp")
        assert run.models[0].holds(served)
    assert "when it was read for the commit" in str(caught.value.causes["local"])
    assert run.publisher.publish().digests_match
    assert run.models[0].holds(values)
