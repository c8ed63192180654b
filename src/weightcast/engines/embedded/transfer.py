"""The engine's end of weight transfer: which version is live, whether it may be served, and the backend's calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from weightcast.digest.versions import INITIAL_VERSION
from weightcast.engines.base import LiveDigests
from weightcast.errors import InvalidInput, StateError
from weightcast.manifest import Manifest
from weightcast.weight_transfer.base import WeightTransferEngine, WorkerRank
from weightcast.weight_transfer.config import WeightTransferConfig
from weightcast.weight_transfer.factory import WeightTransferEngineFactory

if TYPE_CHECKING:
    from weightcast.engines.embedded.live_model import EmbeddedModel
    from weightcast.receiver.greeting import Greeting


class WeightTransfer:
    """One worker's weight transfer. All methods run on the engine's thread; reading attributes is safe anywhere."""

    def __init__(self, config: WeightTransferConfig, model: Any) -> None:
        self.config = config
        self.version = INITIAL_VERSION
        self.num_syncs = 0
        self._model = model
        self._live: EmbeddedModel | None = None
        self._engine: WeightTransferEngine[Any, Any] | None = None
        self._engine_version = INITIAL_VERSION
        self._updated = False
        """Whether an update succeeded in the round that is open."""

    @property
    def dirty(self) -> bool:
        return self._engine is not None and self._engine.dirty

    @property
    def digest(self) -> str | None:
        """The digest that the live version was committed with; None before the first sync, and when the backend does not know."""
        digest = getattr(self._engine, "digest", None)
        return digest if isinstance(digest, str) and digest else None

    @property
    def num_weight_bytes(self) -> int | None:
        """The bytes of weights received so far; None when the backend does not count bytes."""
        return 0 if self._engine is None else self._engine.num_weight_bytes

    @property
    def not_ready(self) -> str:
        """Why nothing may be served now; empty when requests may be served."""
        if self.dirty:
            return "the weights are of no version: an update failed half-way; the next successful one heals it"
        # A first round that was taken back leaves a backend that knows: its digest is that of no content.
        taken_back = getattr(self._engine, "digest", None) == ""
        if self.config.wait_for_weights and (self.num_syncs == 0 or taken_back):
            return "waiting for the first weights"
        return ""

    def greet(self, init_info: Mapping[str, Any]) -> Greeting | None:
        """Begin to join; see WeightTransferEngine.greet."""
        engine = self._created()
        return engine.greet(engine.parse_init_info(_mapping(init_info, "init_info")))

    def init(self, init_info: Mapping[str, Any]) -> None:
        engine = self._created()
        engine.init_transfer_engine(engine.parse_init_info(_mapping(init_info, "init_info")))
        self._refresh()

    def start(self) -> None:
        self._initialised().start_weight_update()
        self._updated = False

    def update(self, update_info: Any) -> None:
        """Hand one update to the backend, or a list of updates, one after the other."""
        engine = self._initialised()
        infos = update_info if isinstance(update_info, list) else [update_info]
        if not infos:
            raise InvalidInput("update_info is an empty list", field="update_info")
        parsed = [engine.parse_update_info(_mapping(info, "update_info")) for info in infos]
        self._updated = False
        for info in parsed:
            engine.update_weights(info)
        self._updated = True
        self._refresh()

    def finish(self, weight_version: str | None) -> None:
        """End the round. Outputs carry the new version from here on.

        A round in which no update succeeded is closed with StateError: the round names no version and counts as no sync.
        """
        engine = self._initialised()
        engine.finish_weight_update(weight_version if self._updated else None)
        if not self._updated:
            raise StateError(
                "no weights came in this round; it is closed, and nothing was changed",
                hint="Call update_weights first. update_weight_version renames what is live",
            )
        self._updated = False
        self.num_syncs += 1
        self._refresh()
        if weight_version is not None and self._engine_version == INITIAL_VERSION:
            self.version = weight_version

    def shutdown(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()

    def checksums(self) -> dict[str, str]:
        if self._engine is not None:
            return self._engine.checksums()
        return self._live_model().checksums()

    def tensor_digests(self, manifest: Manifest) -> LiveDigests:
        return LiveDigests(weight_version=self.version, tensors=self._live_model().tensor_digests(manifest))

    def _refresh(self) -> None:
        """Take over the backend's version when it changed; a label set in between stays until then."""
        assert self._engine is not None
        if self._engine.weight_version != self._engine_version:
            self._engine_version = self.version = self._engine.weight_version

    def _created(self) -> WeightTransferEngine[Any, Any]:
        if self._engine is None:
            self._engine = WeightTransferEngineFactory.create_engine(self.config, self._live_model(), WorkerRank())
        return self._engine

    def _initialised(self) -> WeightTransferEngine[Any, Any]:
        if self._engine is None:
            raise StateError("weight transfer is not initialised", hint="Call init_weight_transfer_engine first")
        return self._engine

    def _live_model(self) -> EmbeddedModel:
        if self._live is None:
            from weightcast.engines.embedded.live_model import EmbeddedModel

            self._live = EmbeddedModel(self._model)
        return self._live


def unwrap(value: Any, name: str) -> Any:
    """Return the inner value of ``{name: inner}`` or of an object with an attribute ``name``; any other value is the inner value itself."""
    if isinstance(value, Mapping):
        return value[name] if set(value) == {name} else value
    return getattr(value, name, value)


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidInput(f"{name} is an object with named fields, not {type(value).__name__}", field=name)
    return value
