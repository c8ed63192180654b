"""Pairs: what a worker's end of the pair with one trainer rank raises says which rank that is."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, PeerLost, WeightcastError
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest
from weightcast.receiver import pairs as receiver_pairs
from weightcast.receiver.pairs import Pairs
from weightcast.receiver.worker_round import RoundId, WorkerRound
from weightcast.transports.base import WorkerEnd

ID = RoundId(epoch=1, round=1)
GONE, LATE = PeerLost, DeadlineExceeded


class End(WorkerEnd):
    """Fails in the call that it is told."""

    def __init__(self, fails: str, kind: type[WeightcastError]) -> None:
        self._fails, self._kind, self.closed = fails, kind, False

    def connect(self, deadline: Deadline) -> None:
        self._may_fail("connect")

    def receive(self, memory: Memory, deadline: Deadline, part: int = 0) -> int:
        self._may_fail("receive")
        return 7

    def _may_fail(self, call: str) -> None:
        if call == self._fails:
            raise self._kind("the other side is gone")

    def abort(self) -> None: ...

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("kind", [GONE, LATE])
@pytest.mark.parametrize("call", ["connect", "receive"])
@pytest.mark.parametrize(("ranks", "named"), [([0, 1], True), ([1], True), ([0], False)], ids=str)
def test_the_rank_is_named_where_there_are_several(
    monkeypatch: pytest.MonkeyPatch, ranks: list[int], named: bool, call: str, kind: type[WeightcastError]
) -> None:
    round = WorkerRound()
    ends = {rank: End(call if rank == ranks[-1] else "", kind) for rank in ranks}
    transport = SimpleNamespace(pulls=False, worker_end=lambda data, copies: ends[int(data)])
    monkeypatch.setattr(receiver_pairs, "registry", lambda: SimpleNamespace(get=lambda name: transport))
    pairs = Pairs(torch.device("cpu"), round, lambda message: None, lambda needs_trainer: None)
    offers = [SimpleNamespace(rank=rank, transport="tcp", data=str(rank)) for rank in ranks]
    setup: Any = SimpleNamespace(offers=offers, holdings={rank: SimpleNamespace(is_streamed=False) for rank in ranks})
    deadline = Deadline(5)
    round.begin(ID, deadline)
    copies: Any = ()
    memory = Memory([torch.zeros(8, dtype=torch.uint8)])

    def use() -> None:
        pairs.set_up(setup, dict.fromkeys(ranks, copies), deadline, lambda ends: None)
        pairs.receive(ID, memory, Manifest.of([]), deadline)

    with pytest.raises(kind) as caught:
        use()
    expected = f"trainer rank {ranks[-1]}: the other side is gone" if named else "the other side is gone"
    assert caught.value.message == expected
    assert pairs.close()
    assert all(end.closed for end in ends.values())
