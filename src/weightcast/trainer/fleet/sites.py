"""Sites: which engines are near each other and far from the trainer, so that they feed each other. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from weightcast.facts import Facts
from weightcast.trainer.clients.urls import engine_name
from weightcast.trainer.fleet.link import EngineLink, WorkerLink
from weightcast.trainer.settings import Relay

NETWORK_BITS = {4: 24, 6: 64}
"""How many bits of an address, by its version, those of one network mostly share."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def site_of(relay: Relay, engine: EngineLink, worker: WorkerLink, trainer: Facts) -> str:
    """The site of a worker; empty where it is in none.

    A user who names sites is believed. "auto": engines whose URLs have hosts of one network are a site, but for those on the trainer's
    machine; whether they then feed each other is measured.
    """
    if relay is False:
        return ""
    if relay == "auto":
        is_here = engine.client.host in LOOPBACK or worker.member.hello.facts.host == trainer.host
        return "" if is_here else _network(engine.client.host)
    sites = enumerate(relay)
    return next((f"site {number}" for number, names in sites if engine.name in map(engine_name, names)), "")


def unknown_names(relay: Relay, engines: Sequence[EngineLink]) -> list[str]:
    """Names of a user's sites that no engine has."""
    if relay is False or relay == "auto":
        return []
    known = {engine.name for engine in engines}
    return [name for names in relay for name in names if engine_name(name) not in known]


def _network(host: str) -> str:
    """What addresses of one network have in common; a name stands for itself."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    return str(ipaddress.ip_network((address, NETWORK_BITS[address.version]), strict=False))
