"""NeMo-RL: weightcast as a checkpoint engine, by config alone.

policy.generation:
  refit_transport: "weightcast.integrations.nemo_rl:WeightcastCheckpointEngine"
  vllm_kwargs: {weight_transfer_config: {backend: weightcast}}
"""

from __future__ import annotations

import os
import re
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from weightcast.errors import StateError
from weightcast.integrations.given_streams import GivenStreams, publish_given
from weightcast.integrations.plug_points import plug_point
from weightcast.report.model import Report
from weightcast.trainer.clients.ray import RayEngineClient, actors_named

MEMBERS = (
    "prepare",
    "init_policy_process_group",
    "init_rollout_process_group",
    "send_weights",
    "receive_weight_batches",
    "finalize",
)
TOKEN = "WEIGHTCAST_TOKEN"
LEADERS = r"{}-(?:grp(\d+)-0|(\d+)-\d+)"
"""Names of NeMo-RL's generation workers that have an engine: the first of each group, and those that are alone."""

_base: Any = plug_point(
    "nemo_rl.utils.checkpoint_engines.base:CheckpointEngine",
    package="nemo-rl",
    wanted="nemo-rl @ git+https://github.com/NVIDIA-NeMo/RL",
    members=MEMBERS,
)


class WeightcastCheckpointEngine(_base):  # type: ignore[misc]
    """NeMo-RL's contract over a Publisher of policy rank 0; rollout workers have nothing to do, as engines take the weights themselves.

    Args:
        bucket_size, release_after_refit: NeMo-RL's own; not used.
        actors: the prefix of the names of NeMo-RL's generation workers, Ray actors whose engines are published to.
        engines: URLs of servers to publish to in their place.
        token: the token that these servers demand. None: that of the environment (WEIGHTCAST_TOKEN).
        options: more arguments of ``integrations.given_streams.GivenStreams`` and of Publisher.
    """

    def __init__(
        self,
        bucket_size: int,
        *,
        actors: str = "vllm_policy",
        engines: Sequence[str] = (),
        token: str | None = None,
        release_after_refit: bool = False,
        **options: Any,
    ) -> None:
        self._actors, self._engines = actors, list(engines)
        self._options = {"token": token or os.environ.get(TOKEN), **options}
        self._streams: GivenStreams | None = None
        self.last_report: Report | None = None

    def prepare(self) -> dict[str, Any]:
        """Nothing to tell; NeMo-RL adds the rank."""
        return {}

    def init_policy_process_group(
        self, *, worker_rank: int, train_world_size: int, rollout_world_size: int, metadata: list[Any]
    ) -> None:
        """Have rank 0 publish; its first round connects."""
        if worker_rank == 0:
            self.finalize()
            engines = self._engines or engines_of(self._actors)
            self._streams = GivenStreams(engines, **self._options)

    def init_rollout_process_group(
        self, *, rollout_rank: int, train_world_size: int, rollout_world_size: int, metadata: list[Any]
    ) -> None:
        """Nothing: the engine around this worker joins the trainer itself."""

    async def send_weights(self, weights: Any) -> None:
        """Publish one refit from rank 0, while the other ranks gather with it."""
        self.last_report = await publish_given(self._streams, weights) or self.last_report

    async def receive_weight_batches(self) -> AsyncGenerator[list[Any], None]:
        """Yield nothing: the engine around this worker has the weights already."""
        return
        yield  # an asynchronous generator, as the framework iterates over it

    def finalize(self) -> None:
        """Leave the engines, as NeMo-RL asks at the end, and behind each refit with ``release_after_refit``."""
        if self._streams is not None:
            self._streams.close()


def engines_of(prefix: str) -> list[RayEngineClient]:
    """NeMo-RL's generation workers with this prefix that have an engine."""
    actors = [actor for _, actor in actors_named(re.compile(LEADERS.format(re.escape(prefix))))]
    if not actors:
        raise StateError(
            f"Ray has no actor whose name begins with {prefix!r} and that generates",
            hint="Start generation before the first refit, or give actors= or engines= in refit_cfg",
        )
    return [RayEngineClient(actor) for actor in actors]
