"""Ports for servers that are about to start. The system gives none of them to somebody's outgoing connection meanwhile."""

from __future__ import annotations

import random
import socket
from pathlib import Path

USUAL = range(10_000, 30_000)
"""Servers of SGLang take further ports, up to a thousand above their own."""
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port(host: str = "127.0.0.1") -> int:
    """Return a TCP port that nobody uses now, outside of the ports that outgoing connections are given."""
    outgoing = ephemeral()
    ports = [port for port in USUAL if port not in outgoing] or list(USUAL)
    for port in random.SystemRandom().sample(ports, len(ports)):
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    raise OSError(f"all ports from {ports[0]} to {ports[-1]} are in use")


def ephemeral() -> range:
    """Return the ports that the system gives to outgoing connections. Systems other than Linux take them from above ``USUAL``."""
    try:
        first, last = EPHEMERAL.read_text().split()
    except FileNotFoundError:
        return range(USUAL.stop, 1 << 16)
    return range(int(first), int(last) + 1)
