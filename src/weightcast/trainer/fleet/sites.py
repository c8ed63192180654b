"""Sites: which engines are near each other and far from the trainer, so that they feed each other. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from weightcast.facts import Facts
from weightcast.trainer.clients.urls import engine_name
from weightcast.trainer.fleet.link import EngineLink, WorkerLink
from weightcast.trainer.settings import Relay

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def site_of(relay: Relay, engine: EngineLink, worker: WorkerLink, trainer: Facts) -> str:
    """The site of a worker; empty where it is in none.

    A user who names sites is believed. "auto": engines whose URLs have the same host are one site, unless that is the trainer's machine.
    """
    if relay is False:
        return ""
    if relay == "auto":
        is_here = engine.client.host in LOOPBACK or worker.member.hello.facts.host == trainer.host
        return "" if is_here else engine.client.host
    sites = enumerate(relay)
    return next((f"site {number}" for number, names in sites if engine.name in map(engine_name, names)), "")


def unknown_names(relay: Relay, engines: Sequence[EngineLink]) -> list[str]:
    """Names of a user's sites that no engine has."""
    if relay is False or relay == "auto":
        return []
    known = {engine.name for engine in engines}
    return [name for names in relay for name in names if engine_name(name) not in known]
