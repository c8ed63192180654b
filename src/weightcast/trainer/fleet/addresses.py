"""Addresses: where engines and other trainer ranks reach this process."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from ipaddress import ip_address

from weightcast.errors import Unsupported


def address_towards(hosts: Iterable[str]) -> str:
    """The address of this host on the way to the engines' hosts; loopback when all are here.

    Raises Unsupported for a host that has IPv6 addresses only: the control channel and the transports use IPv4.
    """
    for host in sorted(set(hosts)):
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((host, 9))
                address = str(probe.getsockname()[0])
        except OSError:
            _refuse_ipv6_only(host)
            continue
        if not address.startswith("127."):
            return address
    return "127.0.0.1"


def _refuse_ipv6_only(host: str) -> None:
    """Nothing when the host has no address at all: the first call to it will say so better."""
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)}
    except OSError:
        return
    if found and all(
        ":" in str(address) and not ip_address(str(address).partition("%")[0]).is_loopback for address in found
    ):
        raise Unsupported(
            f"{host} has IPv6 addresses only, and engines join their trainer over IPv4",
            engine=host,
            hint="Name the engine by an IPv4 address, or give the trainer's own with Publisher(address=)",
        )


def address_beside(endpoint: str) -> str:
    """Where workers reach a rank on rank 0's host: as they reach rank 0, whose endpoint is given."""
    return endpoint.removeprefix("tcp://").rpartition(":")[0]
