"""verl: weightcast as a checkpoint engine, by config alone. The module registers itself when verl imports it.

actor_rollout_ref.rollout.checkpoint_engine:
  backend: weightcast
  custom_backend_module: weightcast.integrations.verl
  engine_kwargs: {weightcast: {token: ...}}
"""

from __future__ import annotations

import os
import re
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from weightcast.deadline import Deadline
from weightcast.errors import StateError
from weightcast.integrations.given_streams import GivenStreams, publish_given
from weightcast.integrations.plug_points import plug_point
from weightcast.report.model import Report
from weightcast.trainer.clients.ray import actors_named, answers_of

BACKEND = "weightcast"
WANTED = "verl>=0.9.1"
MEMBERS = ("prepare", "build_topology", "init_process_group", "finalize", "send_weights", "receive_weights")
SERVER = re.compile(r"(?:vllm|sglang)_server_(\d+)_0(?:_.*)?")
"""Names of verl's actors that serve rollouts over HTTP, on the first node of each replica."""
TOKEN = "WEIGHTCAST_TOKEN"
ASK_S = 60.0

_base: Any = plug_point("verl.checkpoint_engine.base:CheckpointEngine", package="verl", wanted=WANTED, members=MEMBERS)
_registry: Any = plug_point(
    "verl.checkpoint_engine.base:CheckpointEngineRegistry", package="verl", wanted=WANTED, members=("register",)
)


@_registry.register(BACKEND)
class WeightcastCheckpointEngine(_base):  # type: ignore[misc]
    """verl's contract over a Publisher of trainer rank 0; rollout workers have nothing to do, as servers take the weights themselves.

    Args:
        bucket_size, is_master: verl's own; not used.
        token: the token that the servers demand. None: that of the environment (WEIGHTCAST_TOKEN).
        engines: URLs of the servers. None: those of verl's server actors, asked before each sync.
        options: more arguments of ``integrations.given_streams.GivenStreams`` and of Publisher.
    """

    wire_format = "delta_flush"
    """For verl an empty stream of this format means that nothing is to be done behind it."""

    def __init__(
        self,
        bucket_size: int,
        is_master: bool = False,
        *,
        token: str | None = None,
        engines: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        self._given = engines
        # verl has ended all requests before a sync.
        self._options = {"token": token or os.environ.get(TOKEN), "pause": "none", **options}
        self._streams: GivenStreams | None = None
        self._rank: int | None = None
        self.last_report: Report | None = None

    def prepare(self) -> dict[str, Any]:
        """Nothing to tell: connections stay from one sync to the next."""
        return {}

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[dict[str, Any]]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Tell trainer ranks who they are; a rollout worker is none of them."""
        return {"rank": list(range(actor_wg_world_size))}, {"rank": [None] * rollout_world_size}

    def init_process_group(self, rank: int | None) -> None:
        """Have rank 0 look for the servers of this sync."""
        self._rank = rank
        if rank == 0:
            engines = list(self._given) if self._given is not None else server_urls()
            if self._streams is None:
                self._streams = GivenStreams(engines, **self._options)
            else:
                self._streams.serve_to(engines)

    async def send_weights(self, weights: Any, global_steps: int | None = None) -> dict[str, float]:
        """Publish one sync from rank 0, while the other ranks gather with it; metrics for verl's log."""
        report = await publish_given(self._streams, weights)
        if report is None:
            return {}
        self.last_report = report
        return {"weightcast/publish_s": report.total_s, "weightcast/nbytes": float(report.nbytes)}

    async def receive_weights(self, global_steps: int | None = None) -> AsyncGenerator[Any, None]:
        """Yield nothing: the server behind this worker has the weights already."""
        return
        yield  # an asynchronous generator, as the framework iterates over it

    def finalize(self) -> None:
        """Nothing: the next sync goes over the same connections."""


def server_urls() -> list[str]:
    """The URLs of verl's servers, in order of replicas; each is asked of its Ray actor."""
    found = sorted(actors_named(SERVER), key=lambda named: int(named[0][1]))
    if not found:
        raise StateError(
            "Ray has no actor of verl's that serves rollouts",
            hint="Sync once verl has started its servers, or give engine_kwargs.weightcast.engines",
        )
    addresses = answers_of([actor.get_server_address.remote() for _, actor in found], Deadline(ASK_S))
    return [f"http://{f'[{host}]' if ':' in host else host}:{port}" for host, port in addresses]
