"""Rounds of streams in which something else fails, and what a stream may rely on while it is read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from weightcast import Publisher, StreamSource
from weightcast.content.expected import expected_digest
from weightcast.deadline import Deadline
from weightcast.digest.formula import combine
from weightcast.errors import PlanMismatch, RoundFailed, StateError
from weightcast.layout import image_layout
from weightcast.plan import compile_plan
from weightcast.sources import filling, make_source
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.transports.shm import ShmWorkerEnd

TIMEOUT_S = 20.0
ROWS = 40
NAMES = [f"layer.{number}" for number in range(12)]
WINDOW_NBYTES = 4 * ROWS * ROWS * 4
"""Each slot holds one tensor."""

Tensors = dict[str, torch.Tensor]


def fresh() -> Tensors:
    return {name: torch.randn(ROWS, ROWS) for name in NAMES}


def engine_of(request: pytest.FixtureRequest, name: str = "local") -> LocalEngine:
    engine = LocalEngine(name, [DictModel({each: torch.zeros(ROWS, ROWS) for each in NAMES})], mode="staged")
    request.addfinalizer(engine.stop)
    return engine


def stream_of(values: Tensors, visit: Callable[[str], None]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in values.items():
        visit(name)
        yield name, value


class Streamed:
    """A publisher whose stream calls ``visit`` before each tensor of a round."""

    def __init__(self, request: pytest.FixtureRequest, engines: list[LocalEngine], **settings: Any) -> None:
        self.values = fresh()
        self.visit: Callable[[str], None] = lambda name: None
        form = [(name, torch.float32, (ROWS, ROWS)) for name in NAMES]
        source = StreamSource(lambda: stream_of(self.values, self.visit), window_nbytes=WINDOW_NBYTES, metadata=form)
        self.publisher = Publisher(source, engines, timeout_s=TIMEOUT_S, **settings)
        request.addfinalizer(self.publisher.close)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_an_engine_that_leaves_in_the_middle_is_dropped_and_the_others_get_every_byte(
    request: pytest.FixtureRequest, transport: str
) -> None:
    first, second = engine_of(request, "first"), engine_of(request, "second")
    run = Streamed(request, [first, second], transport=transport, require="live")
    run.publisher.publish()
    run.values = fresh()
    run.visit = lambda name: second.stop() if name == NAMES[6] else None
    report = run.publisher.publish()
    assert [engine.ok for engine in report.engines] == [True, False]
    assert first.models[0].holds(run.values)
    run.visit, run.values = (lambda name: None), fresh()
    assert run.publisher.publish().digests_match
    assert first.models[0].holds(run.values)
    assert second.models[0].holds(run.values)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_an_engine_that_leaves_in_the_middle_ends_a_round_of_all(
    request: pytest.FixtureRequest, transport: str
) -> None:
    first, second = engine_of(request, "first"), engine_of(request, "second")
    run = Streamed(request, [first, second], transport=transport)
    run.publisher.publish()
    served, run.values, read = run.values, fresh(), []
    run.visit = lambda name: second.stop() if name == NAMES[3] else read.append(name)
    with pytest.raises(RoundFailed) as caught:
        run.publisher.publish()
    assert set(caught.value.causes) == {"second"}
    assert first.models[0].holds(served)
    assert second.models[0].holds(served)
    run.visit = lambda name: None
    assert run.publisher.publish().digests_match
    assert second.models[0].holds(run.values)


def test_a_refused_commit_is_taken_back_and_the_next_round_works(request: pytest.FixtureRequest) -> None:
    engine = engine_of(request)
    run = Streamed(request, [engine])
    run.publisher.publish()
    served, run.values = run.values, fresh()
    engine.refuse("commit")
    with pytest.raises(RoundFailed):
        run.publisher.publish()
    assert engine.models[0].holds(served)
    engine.refuse()
    run.publisher.publish()
    assert engine.models[0].holds(run.values)


def test_a_stream_waits_for_readers_once_its_slots_are_full(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(request)
    run = Streamed(request, [engine], transport="shm")
    run.publisher.publish()
    go, read, most = threading.Event(), list[str](), list[int]()
    receive = ShmWorkerEnd.receive_proven

    def slowly(self: ShmWorkerEnd, *args: Any) -> Any:
        if not go.is_set():
            # The stream is as far as it can be when nothing has moved for a while.
            before = -1
            while before != len(read):
                before = len(read)
                go.wait(0.3)
            most.append(len(read))
            go.set()
        return receive(self, *args)

    monkeypatch.setattr(ShmWorkerEnd, "receive_proven", slowly)
    run.values, run.visit = fresh(), read.append
    run.publisher.publish()
    assert engine.models[0].holds(run.values)
    assert most == [5], "four slots are full, and the fifth tensor waits"


@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference"])
def test_a_stream_runs_in_its_callers_modes_and_keeps_those_of_its_own_blocks(
    request: pytest.FixtureRequest, mode: str
) -> None:
    engine = engine_of(request)
    run = Streamed(request, [engine])
    seen: list[tuple[bool, bool]] = []
    weight = torch.nn.Parameter(torch.randn(ROWS, ROWS))

    def note(name: str) -> None:
        seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))

    def merged() -> Iterator[tuple[str, torch.Tensor]]:
        note("")
        with torch.no_grad():
            for number, name in enumerate(NAMES):
                note(name)
                weight.add_(1.0 + number)  # a leaf that requires grad may be written in this block only
                run.values[name] = weight.detach().clone()
                yield name, weight
        note("")

    for _ in range(2):
        with {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]():
            outside = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            run.publisher.publish(merged())
            assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == outside
            inside = (False, outside[1])
        assert seen == [outside, *[inside] * len(NAMES), outside]
        assert engine.models[0].holds(run.values)
        seen.clear()


def test_a_stream_that_calls_its_own_publisher_is_told_so(request: pytest.FixtureRequest) -> None:
    engine = engine_of(request)
    run = Streamed(request, [engine])
    run.publisher.publish()
    served, run.values = run.values, fresh()
    run.visit = lambda name: run.publisher.publish() and None
    with pytest.raises(StateError, match="was called while"):
        run.publisher.publish()
    assert engine.models[0].holds(served)


def test_a_stream_is_closed_where_it_stands_when_the_round_fails(request: pytest.FixtureRequest) -> None:
    engine = engine_of(request)
    run = Streamed(request, [engine])
    run.publisher.publish()
    closed: list[str] = []

    def gathered() -> Iterator[tuple[str, torch.Tensor]]:
        for name in NAMES:
            try:
                yield name, torch.zeros(ROWS, 3 if name == NAMES[2] else ROWS)
            finally:
                closed.append(name)

    with pytest.raises(StateError, match=r"'layer\.2' was float32 \(40, 40\)"):
        run.publisher.publish(gathered())
    assert closed == NAMES[:3]


@pytest.mark.parametrize("mode", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_a_stream_leaves_engines_and_publisher_well(
    request: pytest.FixtureRequest, mode: type[BaseException]
) -> None:
    engine = engine_of(request)
    run = Streamed(request, [engine])
    run.publisher.publish()
    served, run.values = run.values, fresh()

    def interrupted(name: str) -> None:
        if name == NAMES[8]:
            raise mode

    run.visit = interrupted
    with pytest.raises(mode):
        run.publisher.publish()
    assert engine.models[0].holds(served)
    run.visit = lambda name: None
    run.publisher.publish()
    assert engine.models[0].holds(run.values)


def test_tensors_that_an_engine_keeps_as_one_are_compared_as_they_come(request: pytest.FixtureRequest) -> None:
    form = {name: torch.zeros(ROWS, ROWS) for name in NAMES[:-1]}
    engine = LocalEngine("tied", [DictModel(form, tied={NAMES[-1]: NAMES[0]})], mode="staged")
    request.addfinalizer(engine.stop)
    run = Streamed(request, [engine])
    run.values[NAMES[-1]] = run.values[NAMES[0]]
    run.publisher.publish()
    assert engine.models[0].holds(run.values)
    served, run.values = run.values, fresh()
    with pytest.raises(RoundFailed) as caught:
        run.publisher.publish()
    assert isinstance(caught.value.causes["tied"], PlanMismatch)
    assert caught.value.hint == caught.value.causes["tied"].hint
    assert "publish() again" not in str(caught.value), "the same again fails again"
    assert engine.models[0].holds(served)
    run.values[NAMES[-1]] = run.values[NAMES[0]]
    run.publisher.publish()
    assert engine.models[0].holds(run.values)


def test_windows_of_a_large_stream_are_digested_by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window alone is too small for kernels to be loaded; torch would take three times as long for all of them."""
    pytest.importorskip("numba")
    values = {f"layer.{number}": torch.randn(512, 512) for number in range(20)}
    whole = make_source(values)
    whole.refresh()
    source = make_source(StreamSource(lambda: values.items(), window_nbytes=4 * 2**20))
    digests = [
        expected_digest(
            made.manifest,
            compile_plan(made.manifest, {0: made.layout}, image_layout(made.manifest))[0],
            made.memory,
            made.layout if is_streamed else None,
        )
        for made, is_streamed in ((source, True), (whole, False))
    ]
    monkeypatch.setattr("weightcast.cpu.digest.digest_words", lambda *_: pytest.fail("torch digested a window"))
    total, deadline = digests[0].start(source.memory), Deadline(TIMEOUT_S)
    for window in source.pour(lambda window: None, deadline, to_the_end=False):
        digests[0].take(window, source.memory, lambda: None)
    assert total() == digests[1].of(whole.memory)


@pytest.mark.parametrize("threads", [1, 3])
def test_what_is_digested_as_windows_are_filled_is_what_lies_in_them(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors that are whole, cut, cast, strided, off words, empty and single: the windows' own digests, and the sum of a round."""
    pytest.importorskip("numba")
    monkeypatch.setattr("weightcast.cpu.WORTH_NBYTES", 0)
    monkeypatch.setattr(filling, "ALONE_NBYTES", 2**12)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    odd = torch.randn(1001)[1:]
    values = {
        "a": torch.randn(700, 33),
        "b": torch.randn(40, 50).t(),
        "c": odd,
        "d": torch.tensor(3),
        "e": torch.randn(0, 4),
        "f": torch.randn(3001).to(torch.bfloat16),
        "g": torch.randint(0, 100, (37,), dtype=torch.int8),
    }
    source = make_source(StreamSource(lambda: values.items(), window_nbytes=4 * 2**15), dtype=torch.bfloat16)
    copies = tuple(compile_plan(source.manifest, {0: source.layout}, image_layout(source.manifest))[0])
    streamed = expected_digest(source.manifest, copies, source.memory, source.layout)
    total, found, known = streamed.start(source.memory), [], 0
    for window in source.pour(lambda window: None, Deadline(TIMEOUT_S), to_the_end=False):
        part = [copy for copy in copies if copy.part == window]
        found.append(expected_digest(source.manifest, part, source.memory).of(source.memory))
        digest = source.filled_digest(window)
        assert digest in (None, found[-1])
        known += digest is not None
        streamed.take(window, source.memory, lambda: None, digest)
    assert total() == combine(found)
    assert known == len(found) > 1
    # A digest of everything is nobody's who wants a part, or another type.
    one = [copy for copy in copies if copy.region.name == "d"]
    some = expected_digest(source.manifest, one, source.memory, source.layout)
    total = some.start(source.memory)
    for window in source.pour(lambda window: None, Deadline(TIMEOUT_S), to_the_end=False):
        some.take(window, source.memory, lambda: None, 1)
    assert total() not in (0, 1)
