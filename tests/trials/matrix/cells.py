"""The cells of the matrix: each fault under each transport and mode that it can happen in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from tests.support.faults import Action
from tests.trials.matrix.field import DELTA, Field
from tests.trials.matrix.outcome import Finding
from tests.trials.matrix.plays import engines, live, machines, relays, traffic, trainers

Play = Callable[..., Finding]
CPU_TRANSPORTS = ("shm", "tcp", DELTA)
EXTRA_TRANSPORTS = ("nixl",)
"""Of host memory as well, where their package is installed: ``--transports nixl``."""
GPU_TRANSPORTS = ("cuda_ipc", "nccl")
BOTH, STAGED = ("staged", "in_place"), ("staged",)
KILL_POINTS = ("setup", "transfer:start", "transfer:middle", "transfer:end", "commit:start", "commit:end", "answer")
STOP_POINTS = ("setup", "transfer:middle", "transfer:end", "commit:start", "commit:end", "answer")
WAY_BACK: tuple[tuple[str, str, Action], ...] = (
    ("killed", "rollback:start", "kill"),
    ("killed", "rollback:end", "kill"),
    ("stopped", "rollback:start", "stop"),
)


@dataclass(frozen=True, slots=True)
class Cell:
    """One fault under one transport and mode."""

    fault: str
    transport: str
    mode: str
    play: Play

    @property
    def id(self) -> str:
        """A name that fits a command line."""
        return f"{self.fault}-{self.transport}-{self.mode}".replace(" ", "_")

    @property
    def column(self) -> str:
        """Where it stands in the table."""
        return f"{self.transport} {self.mode}"

    @property
    def carried_by(self) -> str:
        """The transport's own name: changes go over tcp."""
        return "tcp" if self.transport == DELTA else self.transport

    @property
    def needs_network(self) -> bool:
        """Whether it takes a network that can be cut."""
        return self.fault.startswith("network")

    @property
    def needs_gpu(self) -> bool:
        return self.transport in GPU_TRANSPORTS

    def run(self) -> Finding:
        """Play it through; AssertionError for a broken promise."""
        return self.play(partial(Field, self.transport, self.mode, device="cuda" if self.needs_gpu else "cpu"))


FAULTS: dict[str, tuple[Play, tuple[str, ...]]] = {
    "trainer killed before a transfer": (partial(trainers.killed, point=None), STAGED),
    "trainer killed in a transfer": (partial(trainers.killed, point="transfer:middle"), BOTH),
    "trainer killed after a transfer": (partial(trainers.killed, point="transfer:end"), STAGED),
    "trainer killed in the commit": (partial(trainers.killed, point="commit:start"), BOTH),
    "trainer stopped in a transfer": (trainers.stopped, STAGED),
    "a second trainer": (trainers.second_is_refused, STAGED),
    "a second trainer takes over": (trainers.second_takes_over, STAGED),
    "engine killed while joining": (engines.killed_while_joining, STAGED),
    "engine stopped while joining": (engines.stopped_while_joining, STAGED),
    **{
        f"engine killed at {point}": (
            partial(engines.killed, point=point),
            BOTH if point in ("transfer:middle", "commit:end") else STAGED,
        )
        for point in KILL_POINTS
    },
    **{
        f"engine stopped at {point}": (
            partial(engines.stopped, point=point),
            BOTH if point in ("transfer:middle", "commit:start") else STAGED,
        )
        for point in STOP_POINTS
    },
    **{
        f"engine {done} at {point}": (partial(engines.struck_on_the_way_back, point=point, action=action), STAGED)
        for done, point, action in WAY_BACK
    },
    "one of two workers cannot commit": (engines.one_of_two_workers_cannot_commit, BOTH),
    "engine slower than the deadline": (engines.slow, BOTH),
    "receiving raises": (engines.transfer_raises, BOTH),
    "the engine's loader raises": (engines.loader_raises, BOTH),
    "no memory for the shadow": (engines.no_memory_for_the_shadow, STAGED),
    "a worker never joins": (engines.never_joins, STAGED),
    "manifests disagree": (engines.manifests_disagree, STAGED),
    "tensor larger than a bucket": (traffic.tensor_larger_than_a_bucket, BOTH),
    "corrupted bytes": (traffic.corrupted_bytes, BOTH),
    "messages twice": (partial(traffic.messages, trouble="duplicate"), BOTH),
    "messages late": (partial(traffic.messages, trouble="late"), STAGED),
    "messages out of order": (partial(traffic.messages, trouble="reorder"), STAGED),
    "order to commit lost": (partial(traffic.commit_lost, orders=1), BOTH),
    "answer to the commit lost": (partial(traffic.commit_lost, answers=1), BOTH),
    "order to commit never arrives": (partial(traffic.commit_lost, orders=1000), STAGED),
    "answer to the commit never arrives": (partial(traffic.commit_lost, answers=1000), STAGED),
    "commit ends after the deadline": (traffic.late_answer, STAGED),
    "HTTP server dies": (traffic.http_server_dies, STAGED),
    "HTTP server dies in the commit": (traffic.http_server_dies_in_the_commit, STAGED),
    "network cut in a transfer": (partial(traffic.network_cut, point="transfer:middle"), BOTH),
    "network cut before the commit": (partial(traffic.network_cut, point="transfer:end"), STAGED),
    "network cut in the commit": (partial(traffic.network_cut, point="commit:start"), STAGED),
    "disk full": (machines.disk_full, STAGED),
    "clock jumps": (machines.clock_jumps, STAGED),
    "live: engine killed in a transfer": (partial(live.without, point="transfer:middle", action="kill"), BOTH),
    "live: engine stopped in a transfer": (partial(live.without, point="transfer:middle", action="stop"), BOTH),
    "live: corrupted bytes": (partial(live.without, point="transfer:end", action="corrupt"), BOTH),
    "live: engine killed in the commit": (partial(live.without, point="commit:start", action="kill"), STAGED),
    **{
        f"relay killed at {point}": (
            partial(relays.relay_lost, point=point, action="kill"),
            BOTH if point == "feed:middle" else STAGED,
        )
        for point in ("setup", "feed:start", "feed:middle", "feed:end")
    },
    "relay stopped at setup": (partial(relays.relay_lost, point="setup", action="stop"), STAGED),
    "relay stopped at feed:middle": (partial(relays.relay_lost, point="feed:middle", action="stop"), BOTH),
    "relay sends other bytes on": (relays.relay_corrupts, BOTH),
    "engine killed while it is fed": (partial(relays.fed_lost, action="kill"), STAGED),
    "engine stopped while it is fed": (partial(relays.fed_lost, action="stop"), ("in_place",)),
}
RELAYING = ("tcp",)
"""Transports by which engines feed each other."""


def cells(transports: Sequence[str] = CPU_TRANSPORTS + EXTRA_TRANSPORTS + GPU_TRANSPORTS) -> list[Cell]:
    """All cells, fault by fault. cuda_ipc maps memory of its own host, so no network lies between its two sides.
    nixl takes the network that UCX chooses for the whole process, which is not the one that is cut."""
    return [
        Cell(fault, transport, mode, play)
        for fault, (play, modes) in FAULTS.items()
        for transport in transports
        for mode in modes
        if not (fault.startswith("network") and transport in (*GPU_TRANSPORTS, *EXTRA_TRANSPORTS))
        if transport in RELAYING or not _is_of_relays(play)
    ]


def _is_of_relays(play: Play) -> bool:
    whole = play.func if isinstance(play, partial) else play
    return whole.__module__ == relays.__name__
