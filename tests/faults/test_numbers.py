"""Version numbers never go back, whatever an engine says of the numbers that it has had."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from weightcast import Publisher
from weightcast.deadline import Deadline
from weightcast.digest.versions import MAX_DIGITS, version_number
from weightcast.errors import ProtocolError
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.trainer.fleet.link import BELIEVED_LEAD, BELIEVED_NUMBER

LIES = [10**18 - 2, 2**63 - 1, 10**15 - 2, BELIEVED_NUMBER + 1]


def engine_of(name: str) -> LocalEngine:
    return LocalEngine(name, [DictModel({"w": torch.zeros(16)})])


def lie(engine: LocalEngine, number: int) -> None:
    engine.workers[0].receiver.highest = number


def value() -> dict[str, torch.Tensor]:
    return {"w": torch.randn(16)}


class Boaster(LocalEngine):
    """Says in its status that it serves a version that nobody published."""

    boast = ""

    def status(self, deadline: Deadline) -> Mapping[str, Any]:
        said = dict(super().status(deadline))
        return {**said, "weight_version": self.boast} if self.boast else said


@pytest.mark.parametrize("number", LIES)
def test_a_number_that_nobody_can_believe_keeps_the_engine_out(number: int) -> None:
    honest, liar = engine_of("honest"), engine_of("liar")
    lie(liar, number)
    with Publisher(value(), [honest, liar], require="live", timeout_s=10) as publisher:
        numbers = [publisher.publish().number for _ in range(3)]
        assert numbers == [1, 2, 3]
    with (
        Publisher(value(), [liar], timeout_s=10) as publisher,
        pytest.raises(ProtocolError, match=str(number)) as caught,
    ):
        publisher.connect()
    assert caught.value.engine == "liar"
    lie(liar, 0)  # as the hint says: a restarted engine begins anew
    with Publisher(value(), [honest, liar], timeout_s=10) as publisher:
        assert publisher.publish().number == 4


def test_an_engine_that_joins_later_is_believed_for_a_lead_and_no_more() -> None:
    first, late, liar = engine_of("first"), engine_of("late"), engine_of("liar")
    with Publisher(value(), [first], timeout_s=10) as publisher:
        assert publisher.publish().number == 1
        lie(late, 1 + BELIEVED_LEAD)
        publisher.add(late)
        assert publisher.publish().number == 2 + BELIEVED_LEAD
        lie(liar, 4 + 2 * BELIEVED_LEAD)
        with pytest.raises(ProtocolError, match="highest that this trainer knows of"):
            publisher.add(liar)
        assert publisher.publish().number == 3 + BELIEVED_LEAD


def test_the_highest_number_that_is_believed_uses_up_nothing() -> None:
    engine = engine_of("liar")
    lie(engine, BELIEVED_NUMBER)
    with Publisher(value(), [engine], timeout_s=10) as publisher:
        for ahead in (1, 2, 3):
            report = publisher.publish()
            assert report.number == version_number(report.version) == BELIEVED_NUMBER + ahead
    assert 10**MAX_DIGITS > 900 * BELIEVED_NUMBER


def test_a_log_is_believed_beyond_what_an_engine_says(tmp_path: Path) -> None:
    engine, log = engine_of("one"), tmp_path / "rounds.jsonl"
    lie(engine, BELIEVED_NUMBER)
    with Publisher(value(), [engine], timeout_s=10, log=log) as publisher:
        assert publisher.publish().number == BELIEVED_NUMBER + 1
    with Publisher(value(), [engine], timeout_s=10, log=log) as publisher:
        assert publisher.publish().number == BELIEVED_NUMBER + 2


def test_a_status_that_boasts_moves_no_number() -> None:
    honest, boaster = engine_of("honest"), Boaster("boaster", [DictModel({"w": torch.zeros(16)})])
    weights = value()
    with Publisher(weights, [honest, boaster], require="live", timeout_s=10) as publisher:
        assert publisher.publish().number == 1
        boaster.boast = "999999999999999-0123456789ab"
        boaster.refuse("commit", "rollback")
        weights["w"] = torch.randn(16)
        publisher.publish()
        boaster.refuse()
        numbers = []
        for _ in range(3):
            weights["w"] = torch.randn(16)
            numbers.append(publisher.publish().number)
        assert numbers == sorted(set(numbers))
        assert max(numbers) < 10
