"""Addresses: where engines and other trainer ranks reach this process."""

from __future__ import annotations

import socket
from collections.abc import Iterable


def address_towards(hosts: Iterable[str]) -> str:
    """The address of this host on the way to the engines' hosts; loopback when all are here."""
    for host in sorted(set(hosts)):
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((host, 9))
                address = str(probe.getsockname()[0])
        except OSError:
            continue
        if not address.startswith("127."):
            return address
    return "127.0.0.1"


def address_beside(endpoint: str) -> str:
    """Where workers reach a rank on rank 0's host: as they reach rank 0, whose endpoint is given."""
    return endpoint.removeprefix("tcp://").rpartition(":")[0]
