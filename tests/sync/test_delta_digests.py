"""Digests of rounds that send changes follow from what changed, read where it lies before and after; any doubt has all bytes read.

The tensors are tiny, so kernels are loaded as if they were not.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from tests.sync.test_deltas import SHAPES, Tensors, codecs, load_kernels, serving, step, weights, workers

from weightcast import Publisher, cpu
from weightcast.content.layout_digest import LayoutDigest
from weightcast.errors import RoundFailed
from weightcast.layout.memory import Memory
from weightcast.receiver import session
from weightcast.report.model import Report
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.transports import kept

pytest.importorskip("numba", reason="kernels read what changes")


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    load_kernels()  # before the first round, whose time is short
    with patch.object(cpu, "WORTH_NBYTES", 0):
        yield


@contextmanager
def read_in_whole() -> Iterator[list[LayoutDigest]]:
    """All digests of all bytes that anybody takes, on either side, in the order in which they are taken."""
    seen: list[LayoutDigest] = []
    honest = LayoutDigest.start

    def start(self: LayoutDigest, *given: Any) -> Any:
        if self.runs:
            seen.append(self)
        return honest(self, *given)

    with patch.object(LayoutDigest, "start", start):
        yield seen


@contextmanager
def all_read_after(rounds: int) -> Iterator[None]:
    with patch.object(session, "FULL_EVERY", rounds), patch.object(kept, "FULL_EVERY", rounds):
        yield


def digested(report: Report) -> set[str]:
    return {worker.digested for worker in workers(report)}


def empty(source: Tensors) -> Tensors:
    return {name: torch.zeros_like(value) for name, value in source.items()}


READ_AFTER_COMMITS = ("exchanged", "two shadows")
"""Where a commit moves all bytes, all of them are read afterwards."""


@pytest.mark.parametrize("shape", SHAPES)
def test_digests_follow_from_what_changed(shape: str) -> None:
    make, settings = SHAPES[shape]
    source = weights()
    models = make(empty(source))
    told, read = [], []
    with serving(models, source, **settings) as publisher:
        for number in range(7):
            with read_in_whole() as seen:
                report = publisher.publish()
            assert all(model.holds(source) for model in models), number
            told.append(digested(report))
            read.append(len(seen))
            step(source, share=(0.02, 0.0, 0.0005, 0.3, 0.02)[number % 5])
    assert told[0] == {"all"}
    if shape in READ_AFTER_COMMITS:
        assert told == [{"all"}] * 7
        return
    # Two memories take turns: the second one is brought up to date by a copy, and read in whole then.
    assert told[3:] == [{"changed"}] * 4
    # What is published is cut differently for two workers than for one name: that digest is of all bytes.
    assert read[3:] == [1 if len(models) > 1 else 0] * 4


@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_now_and_then_all_bytes_are_read(mode: str) -> None:
    source = weights()
    model = DictModel(empty(source))
    read = []
    with all_read_after(4), serving([model], source, mode=mode) as publisher:
        for _ in range(16):
            with read_in_whole() as seen:
                report = publisher.publish()
            assert model.holds(source)
            read.append(("all" in digested(report), len(seen)))
            step(source)
    whole = [number for number, (is_whole, _) in enumerate(read) if is_whole]
    assert max(later - earlier for earlier, later in itertools.pairwise(whole)) <= 5
    assert 4 <= len(whole) <= 9
    assert sum(count == 0 for _, count in read) >= 5


def spoil(memory: Memory, model: DictModel, name: str, at: int) -> None:
    """One element of what lies there is another one, behind everybody's back."""
    live = model.parameters()[name]
    start = live.data_ptr() - model.memory().storages[0].data_ptr()
    memory.view(0, "int16", start // 2, (live.numel(),), (1,))[at] += 64


@contextmanager
def with_a_spoiled_element(mode: str, *, changes: bool) -> Iterator[tuple[Publisher, DictModel, Tensors]]:
    """A fleet whose next round writes a memory in which an element is wrong that the round changes, or leaves alone."""
    source = {"w": (torch.randn(500, 400) * 0.02).to(torch.bfloat16), "f": torch.randn(300)}
    model = DictModel(empty(source))
    bits = source["w"].view(torch.int16).view(-1)
    kept_bits = bits[777].clone()

    def other_steps() -> None:
        step(source)
        bits[777] = kept_bits  # rounds that write two steps' changes must not find it either

    with serving([model], source, mode=mode) as publisher:
        for _ in range(4):
            publisher.publish()
            other_steps()
            former = model.memory()
        assert digested(publisher.publish()) == {"changed"}
        other_steps()
        bits[777] += 1 if changes else 0
        spoil(former, model, "w", 777)
        yield publisher, model, source


@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_a_wrong_base_where_something_changes_is_noticed_at_once(mode: str) -> None:
    """With differences the sum of all would not show it."""
    with with_a_spoiled_element(mode, changes=True) as (publisher, model, source):
        with pytest.raises(RoundFailed, match="round before"):
            publisher.publish()
        assert codecs(publisher.publish()) == {"dense"}
        assert model.holds(source)


@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_a_wrong_base_where_nothing_changes_is_noticed_when_all_bytes_are_read(mode: str) -> None:
    with all_read_after(6), with_a_spoiled_element(mode, changes=False) as (publisher, model, source):
        failures: list[str] = []
        for _ in range(8):
            try:
                publisher.publish()
            except RoundFailed as error:
                failures.append(str(error))
                break
        assert failures
        assert "digest" in failures[0]
        assert codecs(publisher.publish()) == {"dense"}
        assert model.holds(source)


def test_a_round_that_is_taken_back_leaves_what_digests_are_added_to() -> None:
    """The shadow after a roll-back holds the round that failed, and its digest goes with it."""
    source = weights()
    models = [DictModel(empty(source)) for _ in range(2)]
    engines = [LocalEngine(name, [model], mode="staged") for name, model in zip("ab", models, strict=True)]
    with Publisher(source, engines, transport="tcp", delta=True, bucket_nbytes=2**16, timeout_s=20) as publisher:
        for number in range(12):
            if number % 4 == 3:
                served = {name: value.clone() for name, value in models[0].parameters().items()}
                engines[1].refuse("commit")
                with pytest.raises(RoundFailed):
                    publisher.publish()
                assert all(model.holds(served) for model in models)
                engines[1].refuse()
            publisher.publish()
            assert all(model.holds(source) for model in models), number
            step(source)
    for engine in engines:
        engine.stop()


def test_an_engine_that_joins_is_digested_in_whole_beside_one_that_is_not() -> None:
    source = weights()
    first, second = DictModel(empty(source)), DictModel(empty(source))
    late = LocalEngine("late", [second], mode="in_place")
    with serving([first], source) as publisher:
        for _ in range(4):
            publisher.publish()
            step(source)
        publisher.add(late)
        seen = []
        for _ in range(3):
            step(source)
            report = publisher.publish()
            assert first.holds(source)
            assert second.holds(source)
            seen.append({engine.name: engine.workers[0].digested for engine in report.engines})
    assert seen[-1] == {"local": "changed", "late": "changed"}
    late.stop()
