"""weightcast's calls about adapters in one vLLM worker: each adapter has a StockWorker of its own, beside the model's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from weightcast.commit.worker_outcome import AdapterOutcome, WorkerOutcome
from weightcast.engines.stock.worker import StockWorker, refusal
from weightcast.engines.vllm.adapters import VllmAdapter, VllmAdapters
from weightcast.errors import UnknownModel, WeightcastError
from weightcast.manifest.adapters import check_name, version_label
from weightcast.weight_transfer.base import WorkerRank

THERE = "there"
"""In an answer: the numbers of all versions that requests may name, of whatever adapter. For the engine core."""
JOINING = frozenset({"greet", "init"})


class AdapterWorker(StockWorker):
    """One adapter's calls."""

    def __init__(self, rank: WorkerRank, adapter: VllmAdapter) -> None:
        super().__init__(rank, lambda: adapter)
        self._adapter = adapter
        self._named: frozenset[int] = frozenset()

    def call_about(self, action: str, payload: Mapping[str, Any], named: frozenset[int]) -> dict[str, Any]:
        """``call``, while requests name these numbers."""
        self._named = named
        return self.call(action, payload)

    def _round(self, payload: Mapping[str, Any]) -> None:
        key = "\0".join(str(payload.get(part)) for part in ("epoch", "round", "version"))
        self._keep_error(lambda: self._adapter.prepare(key, self._named))
        if self._error is not None:
            return
        super()._round(payload)
        current = self._adapter.current
        if (
            self._error is None
            and payload.get("action") == "commit"
            and current is not None
            and self.engine is not None
        ):
            current.label = version_label(self._adapter.name, self.engine.weight_version)

    def _outcome(self) -> WorkerOutcome:
        return msgspec.structs.replace(super()._outcome(), ids=self._adapter.ids)

    @property
    def served(self) -> AdapterOutcome:
        """What the worker serves under the adapter's name."""
        outcome = self._outcome()
        return AdapterOutcome(
            weight_version=outcome.weight_version, digest=outcome.digest, dirty=outcome.dirty, ids=outcome.ids
        )


class AdapterCalls:
    """The adapters of one worker by name. Nothing raises out of ``call``."""

    def __init__(self, rank: WorkerRank, adapters: VllmAdapters) -> None:
        self._rank, self._adapters = rank, adapters
        self.workers: dict[str, AdapterWorker] = {}

    def call(self, name: Any, action: str, payload: Mapping[str, Any]) -> dict[str, Any]:
        """A call about an adapter. ``payload`` has, beside what a call about the model has, the numbers that requests name."""
        own = {key: value for key, value in payload.items() if key not in ("adapter", "named")}
        named = frozenset(payload.get("named") or ())
        self._adapters.tidy(named)
        try:
            record = self._worker(name, action).call_about(action, own, named)
        except WeightcastError as error:
            record = refusal(self._rank.rank, error)
        return {**record, THERE: self._adapters.numbers}

    def shutdown(self) -> None:
        """Leave the trainers of all adapters. What is served stays. A second call does nothing."""
        for worker in self.workers.values():
            worker.shutdown()

    def served(self) -> dict[str, Any]:
        """What is served under each name, in builtin types."""
        found: dict[str, Any] = msgspec.to_builtins({name: worker.served for name, worker in self.workers.items()})
        return found

    def _worker(self, name: Any, action: str) -> AdapterWorker:
        if name not in self.workers:
            if action not in JOINING:
                raise UnknownModel(f"no trainer publishes an adapter {str(name)[:80]!r} here", field="adapter")
            self.workers[check_name(name)] = AdapterWorker(self._rank, self._adapters.named(name))
        return self.workers[name]
