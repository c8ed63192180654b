"""The engine's end of weight transfer for adapters: each has a backend of its own, which the model's rounds know nothing of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightcast.engines.base import AdapterStatus
from weightcast.engines.embedded.adapters import Adapters
from weightcast.errors import InvalidInput, StateError, UnknownModel
from weightcast.manifest.adapters import check_name, version_label
from weightcast.receiver.greeting import Greeting
from weightcast.weight_transfer.base import WorkerRank
from weightcast.weight_transfer.config import WeightTransferConfig
from weightcast.weight_transfer.weightcast import WeightcastEngine


class AdapterTransfers:
    """Weight transfer of all adapters of an engine. Methods run on the engine's thread, but for ``check`` and ``status``."""

    def __init__(self, config: WeightTransferConfig, adapters: Adapters, *, reserved: str) -> None:
        self._config, self._adapters, self._reserved = config, adapters, reserved
        self._engines: dict[str, WeightcastEngine] = {}

    @property
    def names(self) -> list[str]:
        """The adapters of which a version is live."""
        return [name for name in list(self._engines) if self._adapters.named(name).current is not None]

    @property
    def joined(self) -> list[str]:
        """The adapters whose trainer has joined, now or before."""
        return list(self._engines)

    def check(self, name: str) -> None:
        """Raise UnknownModel, or StateError, where a request for an adapter cannot be served."""
        self._adapters.find(name)
        engine = self._engines.get(name.partition("@")[0])
        if engine is not None and engine.dirty:
            raise StateError(f"the adapter {name!r} is of no version: a commit failed", hint="Publish it again")

    def greet(self, init_info: Mapping[str, Any]) -> Greeting:
        """Begin to join the trainer of an adapter."""
        engine, info = self._parsed(init_info)
        return engine.greet(info)

    def init(self, init_info: Mapping[str, Any]) -> None:
        """Join the trainer of an adapter, which ``init_info`` names."""
        engine, info = self._parsed(init_info)
        try:
            engine.init_transfer_engine(info)
        except Exception:
            if not engine.receiver.has_session:
                adapter = self._adapters.named(info.adapter)
                adapter.forget()  # what was reserved for this trainer
                if adapter.current is None:
                    self._engines.pop(info.adapter, None)
            raise

    def update(self, name: str, update_info: Any) -> None:
        """Make a round live, or take it back. The name stands for that version when this returns."""
        engine = self._engines.get(name)
        if engine is None:
            raise UnknownModel(f"no trainer publishes an adapter {name!r} here", field="name")
        if not isinstance(update_info, Mapping):
            raise InvalidInput("update_info is an object with named fields", field="update_info")
        info = engine.parse_update_info(update_info)
        engine.close_update()
        engine.start_weight_update()
        engine.update_weights(info)
        engine.finish_weight_update()
        current = self._adapters.named(name).current
        if current is not None and info.action == "commit":
            current.label = version_label(name, engine.weight_version)

    def remove(self, name: str) -> None:
        """Serve an adapter no more. Requests that run on it end as they would have."""
        engine = self._engines.pop(name, None)
        if engine is None:
            raise UnknownModel(f"no adapter {name!r} is served", field="name")
        engine.shutdown()
        self._adapters.named(name).remove()

    def status(self) -> dict[str, AdapterStatus]:
        """What each name stands for."""
        found = {}
        for name, engine in list(self._engines.items()):
            adapter = self._adapters.named(name)
            with self._adapters.lock:
                versions = {version.label: version.num_requests for version in adapter.versions()}
            is_there = adapter.current is not None and not engine.dirty
            found[name] = AdapterStatus(
                weight_version=engine.weight_version,
                digest=engine.digest or None,
                dirty=engine.dirty,
                ready=is_there,
                versions=versions,
            )
        return found

    def shutdown(self) -> None:
        """Leave the trainers of all adapters."""
        for engine in list(self._engines.values()):
            engine.shutdown()

    def _parsed(self, init_info: Mapping[str, Any]) -> tuple[WeightcastEngine, Any]:
        name = check_name(init_info["adapter"])
        if name == self._reserved:
            raise InvalidInput(
                f"{name!r} is the name of the model itself", field="adapter", hint="Name the adapter otherwise"
            )
        engine = self._engines.get(name)
        if engine is None:
            engine = WeightcastEngine(self._config, self._adapters.named(name), WorkerRank())
            info = engine.parse_init_info(init_info)
            self._engines[name] = engine
            return engine, info
        return engine, engine.parse_init_info(init_info)
