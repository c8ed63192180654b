"""Chains: workers that feed each other, from the set-up of their pairs to what a round says of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from weightcast.errors import DigestMismatch, WeightcastError
from weightcast.trainer.fleet.feeding import Feeding
from weightcast.trainer.fleet.link import EngineLink, WorkerLink
from weightcast.trainer.fleet.round_book import RoundBook
from weightcast.trainer.settings import Relay

logger = logging.getLogger(__name__)


def chain_up(workers: Sequence[WorkerLink], relay: Relay, is_chain: bool) -> None:
    """Note who feeds whom of a group's workers, whose pairs are new. A chain of the same workers goes on with what was measured."""
    if not is_chain:
        for worker in workers:
            worker.feeding, worker.fed_by = None, ""
            if worker.site:
                worker.no_relay = "no relay, as nobody else of its site gets the same by the same transport"
        return
    known = workers[0].feeding
    is_same = known is not None and known.count == len(workers) and all(w.feeding is known for w in workers)
    feeding = known if known is not None and is_same else Feeding(len(workers), is_measured=relay == "auto")
    feeding.renew()
    before = ""
    for worker in workers:
        worker.feeding, worker.fed_by = feeding, before
        before = f"{worker.member.engine} worker {worker.member.rank}"


def choose_feeding(workers: Sequence[WorkerLink]) -> None:
    """Choose for the round that begins whether chains are used."""
    for feeding in {worker.feeding for worker in workers} - {None}:
        assert feeding is not None
        feeding.choose()
    for worker in workers:
        if worker.feeding is not None and worker.end is not None:
            worker.end.feed(worker.feeding.is_on)


def settle_feeding(engines: Sequence[EngineLink], book: RoundBook) -> None:
    """Take from a round that is over how long its chains took, and whom they cannot trust."""
    chains: dict[Feeding, list[tuple[EngineLink, WorkerLink]]] = {}
    for engine in engines:
        for worker in engine.workers:
            if worker.feeding is not None:
                chains.setdefault(worker.feeding, []).append((engine, worker))
    for feeding, pairs in chains.items():
        if feeding.is_on:
            _suspect(pairs, book)
        if all(book.of(engine).committed for engine, _ in pairs):
            each = [book.progress(worker) for _, worker in pairs]
            feeding.note(sum(one.nbytes for one in each), max(one.seconds for one in each))


def _suspect(pairs: Sequence[tuple[EngineLink, WorkerLink]], book: RoundBook) -> None:
    """Where wrong bytes came to a worker from one that has the right ones, both are in no chain any more, before they join anew: which
    of them is at fault cannot be told. Those after them only got what was wrong already."""
    wrong = [_is_wrong(book.of(engine).error, worker) for engine, worker in pairs]
    for number, (engine, worker) in enumerate(pairs):
        if wrong[number] and not (number and wrong[number - 1]):
            source = worker.fed_by or "the trainer"
            said = f"no relay any more, as {engine.name} worker {worker.member.rank} got wrong bytes from {source}"
            logger.warning("%s", said)
            for _, suspect in pairs[max(0, number - 1) : number + 1]:
                suspect.suspicion, suspect.site = said, ""


def _is_wrong(error: WeightcastError | None, worker: WorkerLink) -> bool:
    return isinstance(error, DigestMismatch) and error.worker == worker.member.rank
