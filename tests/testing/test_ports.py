"""Ports for servers: free, and not of those that the system gives away by itself."""

from __future__ import annotations

import random
import socket
from pathlib import Path

import pytest

from weightcast.testing import ports


def test_a_port_is_none_of_those_that_outgoing_connections_get() -> None:
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    found = {ports.free_port() for _ in range(20)}
    assert len(found) > 15, "processes that start at the same time get different ports"
    assert not [port for port in found if first <= port <= last]


def test_a_port_in_use_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", ports.free_port())) as taken:
        number, other = taken.getsockname()[1], ports.free_port()
        monkeypatch.setattr(random.SystemRandom, "sample", lambda *_: [number, other])
        assert ports.free_port() == other


def test_where_outgoing_connections_get_every_port_one_of_them_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    all_ports = tmp_path / "range"
    all_ports.write_text("1024\t65535\n")
    monkeypatch.setattr(ports, "EPHEMERAL", all_ports)
    assert ports.free_port() in ports.USUAL
