"""The default backend: a Receiver behind the contract that vLLM's engines use.

``update_weights`` carries what the trainer wants done between two steps: make round (epoch, round) live, or take it back. The
bytes themselves travel beside the engine, before or inside that call, as the mode says.
"""

from __future__ import annotations

from typing import Literal

from weightcast.control.link import JoinInfo
from weightcast.deadline import Deadline
from weightcast.errors import MERGED_HINT, InvalidInput, StateError, Unsupported
from weightcast.receiver.adapter_model import AdapterModel
from weightcast.receiver.base import LiveModel
from weightcast.receiver.greeting import Greeting
from weightcast.receiver.receiver import Receiver
from weightcast.receiver.worker_round import RoundId
from weightcast.untrusted.secret import repr_without
from weightcast.weight_transfer.base import InitInfo, UpdateInfo, WeightTransferEngine, WorkerRank
from weightcast.weight_transfer.config import WeightTransferConfig


class WeightcastInitInfo(InitInfo, kw_only=True, forbid_unknown_fields=True):
    """How to reach the trainer; see control.link.JoinInfo for the fields."""

    address: str
    public_key: str
    ticket: str
    engine: str
    timeout_s: float = 60.0
    silence_s: float = 5.0
    takeover: bool = False
    session: str = ""
    left: tuple[str, ...] = ()
    adapter: str = ""
    """The name of the LoRA adapter that the trainer publishes; empty for the model itself."""
    world_size: int | None = None
    """How many workers the trainer has join, all replicas of the engine included: replicas of vLLM do not know."""

    __repr__ = repr_without("ticket")

    def __post_init__(self) -> None:
        self.join_info()
        if self.world_size is not None and self.world_size < 1:
            raise InvalidInput("world_size is at least 1", field="world_size")

    def join_info(self) -> JoinInfo:
        return JoinInfo(
            address=self.address,
            public_key=self.public_key,
            ticket=self.ticket,
            engine=self.engine,
            timeout_s=self.timeout_s,
            silence_s=self.silence_s,
            takeover=self.takeover,
            session=self.session,
            left=self.left,
        )


class WeightcastUpdateInfo(UpdateInfo, kw_only=True, forbid_unknown_fields=True):
    """Which round to make live ("commit") or to take back ("rollback")."""

    epoch: int
    round: int
    action: Literal["commit", "rollback"] = "commit"
    version: str = ""
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("epoch", "round"):
            if getattr(self, name) < 0:
                raise InvalidInput(f"{name} is not negative", field=name)
        if not 0 < self.timeout_s <= 86400:
            raise InvalidInput("timeout_s is between 0 and 86400 seconds", field="timeout_s")


class WeightcastEngine(WeightTransferEngine[WeightcastInitInfo, WeightcastUpdateInfo]):
    """One worker's Receiver behind the five calls."""

    init_info_cls = WeightcastInitInfo
    update_info_cls = WeightcastUpdateInfo

    def __init__(self, config: WeightTransferConfig, model: LiveModel, worker: WorkerRank) -> None:
        super().__init__(config, model, worker)
        self.receiver = Receiver(model, rank=worker.rank, world_size=worker.world_size, mode=config.mode)
        self._open = False
        self._updated = False
        self._label: str | None = None

    def greet(self, init_info: WeightcastInitInfo) -> Greeting:
        if bool(init_info.adapter) != isinstance(self.model, AdapterModel):
            raise Unsupported("this engine takes whole weights, and no adapters", hint=MERGED_HINT)
        if init_info.world_size is not None:
            self.worker = WorkerRank(rank=self.worker.rank, world_size=init_info.world_size)
        return self.receiver.greet(init_info.join_info(), self.worker.world_size)

    def init_transfer_engine(self, init_info: WeightcastInitInfo) -> None:
        """Join a trainer. An update that is open between two calls is closed: whoever opened it is gone, or was taken over."""
        self.greet(init_info)
        self.receiver.join(init_info.join_info(), self.worker.world_size)
        self.close_update()

    def close_update(self) -> None:
        """Close an update that somebody left open; idempotent. What it carried out stays."""
        self._open = False

    def start_weight_update(self) -> None:
        if not self.receiver.has_session:
            raise StateError("no trainer is connected", hint="Call init_weight_transfer_engine first")
        if self._open:
            raise StateError("a weight update is open already", hint="Call finish_weight_update first")
        self._open, self._updated = True, False

    def update_weights(self, update_info: WeightcastUpdateInfo) -> None:
        if not self._open:
            raise StateError("no weight update is open", hint="Call start_weight_update first")
        id = RoundId(epoch=update_info.epoch, round=update_info.round)
        try:
            if update_info.action == "commit":
                self.receiver.commit(id, Deadline(update_info.timeout_s), update_info.version)
            else:
                self.receiver.rollback(id)
        except Exception:
            self._open = False
            raise
        self._label, self._updated = None, True

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        if not self._open:
            raise StateError("no weight update is open", hint="Call start_weight_update first")
        self._open = False
        if not self._updated:
            raise StateError(
                "no update was carried out in this round; it is closed, and nothing was changed",
                hint="Call update_weights between start_weight_update and finish_weight_update",
            )
        self._label = weight_version or self._label

    def shutdown(self) -> None:
        self._open = False
        self.receiver.leave()

    def sleep(self, *, loses: bool) -> None:
        """See Receiver.sleep. A label that somebody gave goes with the weights."""
        self._open = False
        self._label = None if loses else self._label
        self.receiver.sleep(loses=loses)

    def replaced(self, version: str) -> None:
        """See Receiver.replaced."""
        self._open, self._label = False, None
        self.receiver.replaced(version)

    @property
    def weight_version(self) -> str:
        return self._label or self.receiver.version

    @property
    def dirty(self) -> bool:
        return self.receiver.dirty

    @property
    def num_weight_bytes(self) -> int:
        return self.receiver.num_bytes

    @property
    def digest(self) -> str:
        """Hex digest of the content that is live, as published; empty before the first sync."""
        return self.receiver.content
