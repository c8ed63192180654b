"""The engine's side of weight transfer. The names of classes and methods are vLLM's.

An engine builds one WeightTransferEngine per worker and calls it on the thread that runs the model, never during a forward
pass. Order of calls (anything else is StateError):

    init_transfer_engine(init_info)                       once; again after shutdown, or when a new trainer takes over
      ┌ start_weight_update()                             a round begins
      │ update_weights(update_info)                       one or more times
      └ finish_weight_update(weight_version)              the round ends; live weights are of the new version
    shutdown()

A call that raises has changed nothing that the model serves, unless ``dirty`` says so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import msgspec
import torch

from weightcast.errors import InvalidInput
from weightcast.receiver.base import LiveModel
from weightcast.receiver.greeting import Greeting
from weightcast.untrusted.invalid import invalid_input
from weightcast.untrusted.known import known
from weightcast.weight_transfer.config import WeightTransferConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRank:
    """A worker's place among all workers of its engine.

    ``rank`` is global over TP x PP x DP: ``data_parallel_index * (tp * pp) + rank within the replica``, as vLLM counts.
    """

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise InvalidInput(f"rank {self.rank} is not in a world of {self.world_size}", field="rank")


class InitInfo(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The base of the records that ``init_transfer_engine`` takes. Subclasses validate themselves in ``__post_init__``."""


class UpdateInfo(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The base of the records that ``update_weights`` takes."""


InitT = TypeVar("InitT", bound=InitInfo)
UpdateT = TypeVar("UpdateT", bound=UpdateInfo)


class WeightTransferEngine(ABC, Generic[InitT, UpdateT]):
    """One worker's receiver of weights. Subclasses name their info types and implement the five calls."""

    init_info_cls: ClassVar[type[InitInfo]]
    update_info_cls: ClassVar[type[UpdateInfo]]

    def __init__(self, config: WeightTransferConfig, model: LiveModel, worker: WorkerRank) -> None:
        self.config = config
        self.model = model
        self.worker = worker

    @classmethod
    def check_device(cls, device: torch.device) -> None:
        """Raise Unsupported when this backend cannot move weights to ``device``. Called before an engine starts to serve."""

    def parse_init_info(self, data: Mapping[str, Any]) -> InitT:
        """Validate a decoded JSON object; raises InvalidInput that names the field."""
        return _convert(data, self.init_info_cls)  # type: ignore[return-value]

    def parse_update_info(self, data: Mapping[str, Any]) -> UpdateT:
        """Validate a decoded JSON object; raises InvalidInput that names the field."""
        return _convert(data, self.update_info_cls)  # type: ignore[return-value]

    def greet(self, init_info: InitT) -> Greeting | None:
        """Begin to join a trainer and return at once. A caller that waits for the returned greeting beside the engine's thread spares that
        thread the wait in ``init_transfer_engine``, which follows with the same ``init_info``. None when there is nothing to wait for."""
        return None

    @abstractmethod
    def init_transfer_engine(self, init_info: InitT) -> None:
        """Join a trainer. A second call leaves the former trainer and closes an update that the former trainer left open."""

    @abstractmethod
    def start_weight_update(self) -> None:
        """Open a round."""

    @abstractmethod
    def update_weights(self, update_info: UpdateT) -> None:
        """Receive (part of) the new weights."""

    @abstractmethod
    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """End the round. ``weight_version`` names the weights that are live from now on. An engine that was dirty stays dirty when the round
        had no update."""

    @abstractmethod
    def shutdown(self) -> None:
        """Leave the trainer and free its memory. A second call does nothing. ``init_transfer_engine`` works again afterwards."""

    @property
    @abstractmethod
    def weight_version(self) -> str:
        """The version of the live weights; "default" before the first sync."""

    @property
    @abstractmethod
    def dirty(self) -> bool:
        """True while the live weights belong to no version. The engine must not serve then."""

    @property
    def num_weight_bytes(self) -> int | None:
        """The bytes of weights received so far; None in a backend that does not count bytes."""
        return None

    def checksums(self) -> dict[str, str]:
        """Return the hex digest of each live parameter, computed where the data lies. Optional for a backend."""
        return self.model.checksums()


def _convert(data: Mapping[str, Any], cls: type[msgspec.Struct]) -> msgspec.Struct:
    try:
        return msgspec.convert(dict(data), known(cls), strict=False)
    except msgspec.ValidationError as error:
        raise invalid_input(error, what=cls.__name__) from None
