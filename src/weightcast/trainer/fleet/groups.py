"""Groups: which workers share a transfer, so that what all of them want is sent once. Pure."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from weightcast.trainer.fleet.link import EngineLink, WorkerLink

TransferGroup = Sequence[tuple[EngineLink, WorkerLink]]


def groups_of(engines: Sequence[EngineLink], *, share: bool) -> list[TransferGroup]:
    """The groups of engines that are in every round together and whose transports are chosen.

    Staged workers share across the engines of a fleet, or within each engine when ``share`` is False: where one fails the
    transfer breaks for all of a group, which costs a staged engine nothing but the round. In-place workers receive inside
    their engine's commit, which may ask them one by one, so each is a group of its own. Those of a group want the same:
    of engines that are sharded alike, each shard's workers.

    Workers of a site that lay out alike are a group whatever ``share`` says: they feed each other, and none breaks the others'
    transfers. In-place workers are one with those of the same rank of other engines, whose commits run side by side.
    """
    kinds: dict[Hashable, list[tuple[EngineLink, WorkerLink]]] = {}
    for engine in engines:
        scope = "" if share and not engine.in_place else engine.name
        for worker in engine.workers:
            assert worker.transport is not None
            rank = worker.member.rank if worker.in_place else -1
            kind: Hashable = (worker.transport.name, worker.digest_key, scope, rank)
            if worker.site:
                kind = (worker.transport.name, worker.landings.layout, "site", worker.site, rank)
            kinds.setdefault(kind, []).append((engine, worker))
    groups: list[TransferGroup] = []
    for pairs in kinds.values():
        transport = pairs[0][1].transport
        assert transport is not None
        if pairs[0][1].site:
            groups.append(pairs)
            continue
        for numbers in transport.sharing([worker.member.hello.facts for _, worker in pairs]):
            groups.append([pairs[number] for number in numbers])
    return groups


def mates_of(groups: Sequence[TransferGroup]) -> dict[str, frozenset[str]]:
    """For every engine the names of those that cannot be in a round without each other, itself included."""
    mates: dict[str, frozenset[str]] = {}
    for group in groups:
        names = frozenset(engine.name for engine, _ in group)
        together = names.union(*(mates.get(name, names) for name in names))
        for name in together:
            mates[name] = together
    return mates


def feeds_itself(group: TransferGroup) -> bool:
    """Whether the workers of a group feed each other, in their order."""
    return len(group) > 1 and bool(group[0][1].site)
