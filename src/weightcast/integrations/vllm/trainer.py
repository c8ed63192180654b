"""WeightcastTrainer: a trainer-side engine of vLLM's ``WeightTransferTrainerFactory``, for trainers that are written against it.

    info = WeightcastTrainerInfo(rank=0, token=token)
    engine = WeightTransferTrainerFactory.trainer_init(info, client=HTTPVLLMWeightSyncClient(url), source=ModuleSource(model))
    engine.send_weights()

The servers run with weightcast's backend. vLLM's source is a stream: each ``send_weights`` reads it once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from vllm.distributed.weight_transfer.base import TrainerInitInfo, TrainerWeightTransferEngine, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from weightcast.errors import InvalidInput
from weightcast.report.model import Report
from weightcast.sources.streamed import DEFAULT_WINDOW_NBYTES, StreamSource
from weightcast.trainer.publisher import Publisher


@dataclass
class WeightcastTrainerInfo(TrainerInitInfo):  # type: ignore[misc]
    """What a trainer says to be given a WeightcastTrainer.

    ``engines`` are those of a Publisher; without them the client's ``base_url`` is the only one. Trainers of several ranks give
    ``process_group``. ``options`` are more arguments of Publisher.
    """

    backend: ClassVar[str] = "weightcast"

    engines: Sequence[Any] = field(default=(), kw_only=True)
    token: str | None = field(default=None, kw_only=True)
    process_group: Any = field(default=None, kw_only=True)
    window_nbytes: int = field(default=DEFAULT_WINDOW_NBYTES, kw_only=True)
    options: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        # vLLM loads plug-ins in engines only; a trainer that asks for this backend has made one of these.
        register(WeightcastTrainer)


class WeightcastTrainer(TrainerWeightTransferEngine[WeightcastTrainerInfo]):  # type: ignore[misc]
    """A Publisher behind vLLM's contract of a trainer."""

    init_info_cls = WeightcastTrainerInfo

    def __init__(self, publisher: Publisher, *, client: Any, source: WeightSource, is_sender: bool) -> None:
        super().__init__(client=client, source=source, is_sender=is_sender)
        self.publisher = publisher

    @classmethod
    def trainer_init(cls, init_info: WeightcastTrainerInfo, *, client: Any, source: WeightSource | None = None) -> Self:
        """Connect to the engines; on every rank."""
        trainer = cls.unconnected(init_info, client=client, source=source)
        try:
            trainer.publisher.connect()
        except BaseException:
            trainer.publisher.close()
            raise
        return trainer

    @classmethod
    def unconnected(cls, init_info: WeightcastTrainerInfo, *, client: Any, source: WeightSource | None) -> Self:
        """A trainer whose first round connects to the engines."""
        if source is None:
            raise InvalidInput("weightcast sends a WeightSource, and none was given", field="source")
        if init_info.rank > 0 and init_info.process_group is None:
            raise InvalidInput("trainers of several ranks give process_group=", field="process_group")
        publisher = Publisher(
            StreamSource(source, window_nbytes=init_info.window_nbytes),
            _engines_of(init_info, client) if init_info.is_sender else (),
            token=init_info.token,
            process_group=init_info.process_group,
            **init_info.options,
        )
        return cls(publisher, client=client, source=source, is_sender=init_info.is_sender)

    def send_weights(self) -> Report:
        """Publish what the source yields now; raises RoundFailed where an engine does not serve it."""
        return self.publisher.publish()

    def shutdown(self) -> None:
        """Leave the engines, which go on with what they serve."""
        self.publisher.close()


def register(trainer: type[WeightcastTrainer]) -> None:
    """Make a trainer known to vLLM's factory under its backend's name; idempotent."""
    backend = trainer.init_info_cls.backend
    if backend not in WeightTransferTrainerFactory._registry:
        WeightTransferTrainerFactory.register_engine(backend, trainer)


def _engines_of(init_info: WeightcastTrainerInfo, client: Any) -> Sequence[Any]:
    if init_info.engines:
        return init_info.engines
    url = getattr(client, "base_url", None)
    if url is None:
        raise InvalidInput(
            f"a {type(client).__name__} does not say which engines it reaches",
            field="engines",
            hint="Give them, WeightcastTrainerInfo(engines=[...]), as to a Publisher",
        )
    return (url,)
