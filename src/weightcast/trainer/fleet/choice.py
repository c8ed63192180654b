"""Choice: which transport each worker gets. What was tried with a worker and cannot be used is passed over, with the reason."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from weightcast.errors import GroupBroken, NotShared, PeerLost, TransportError, Unsupported, WeightcastError
from weightcast.facts import Facts
from weightcast.trainer.fleet.link import EngineLink, WorkerLink
from weightcast.trainer.ranks import Ranks
from weightcast.transports.base import Transport
from weightcast.transports.registry import registry

logger = logging.getLogger(__name__)


class Choice:
    """Chooses for one publisher: ``wanted`` for every worker, or, where that is None, the best that all trainer ranks can use."""

    def __init__(self, ranks: Ranks, wanted: str | None) -> None:
        self._ranks, self._wanted = ranks, wanted

    def choose(self, worker: WorkerLink) -> None:
        """Set the worker's transport, and why it is that one; Unsupported when there is none."""
        worker.transport, worker.reason = _common_transport(
            self._ranks.facts(), worker.member.hello.facts, self._wanted, worker.unusable
        )
        logger.info("%s worker %d: %s", worker.member.engine, worker.member.rank, worker.reason)

    def pass_over(self, engine: EngineLink, worker: WorkerLink, error: WeightcastError, *, by_trainer: bool) -> bool:
        """Whether the worker's transport turned out to be of no use, and another one may be: the engine has to be set up again.

        ``by_trainer``: it failed before the worker heard of it. What a worker says about its peer or its plan is no reason.
        """
        assert worker.transport is not None
        is_of_transport = isinstance(error, NotShared) or (
            by_trainer
            and isinstance(error, TransportError | Unsupported)
            and not isinstance(error, PeerLost | GroupBroken)
        )
        if self._wanted is not None or not is_of_transport:
            return False
        worker.unusable[worker.transport.name] = error.message
        engine.broken = f"{worker.transport.name} cannot be used: {error.message}"
        logger.info("%s worker %d: %s", engine.name, worker.member.rank, engine.broken)
        return True


def _common_transport(
    ranks: Sequence[Facts], worker: Facts, wanted: str | None, unusable: Mapping[str, str]
) -> tuple[Transport, str]:
    """The best transport that every trainer rank can use with a worker, and why; Unsupported when there is none."""
    choices = [registry().choose(facts, worker, wanted, unusable) for facts in ranks]
    if len({transport.name for transport, _ in choices}) == 1:
        return choices[0]
    reasons = []
    for name in registry().names():
        obstacles = [registry().why_not(name, facts, worker, unusable) for facts in ranks]
        obstacle = next((reason for reason in obstacles if reason is not None), None)
        if obstacle is None:
            return registry().get(name), f"{name} (the best that all trainer ranks can use)"
        reasons.append(f"{name}: {obstacle}")
    raise Unsupported(f"no transport that all trainer ranks can use: {'; '.join(reasons)}")
