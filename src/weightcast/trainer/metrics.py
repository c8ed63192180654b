"""Prometheus metrics of a Publisher, in a registry of its own: several publishers in a process do not mix."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    generate_latest,
    start_http_server,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from weightcast.errors import InvalidInput
from weightcast.report.model import Report

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class TrainerMetrics:
    """Rounds by outcome, seconds by phase, bytes by engine and transport; what each member serves is asked when it is read.

    Outcomes: "committed" on every engine, "partly" without some, "aborted" before anybody served it, "unconnected" when it
    never began.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, members: Callable[[], Mapping[str, str]], versions: Callable[[], Mapping[str, str]]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Members(members, versions))
        self._rounds = Counter("weightcast_rounds", "Rounds by outcome.", ["outcome"], registry=self.registry)
        self._round_seconds = Histogram(
            "weightcast_round_seconds",
            "Duration of a publish().",
            ["outcome"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._phase_seconds = Histogram(
            "weightcast_phase_seconds", "Duration of a phase.", ["phase"], buckets=_SECONDS, registry=self.registry
        )
        self._nbytes = Counter(
            "weightcast_transferred_bytes",
            "Bytes that engines received, whether they were committed or not.",
            ["engine", "transport"],
            registry=self.registry,
        )
        self._failures = Counter(
            "weightcast_engine_failures", "Rounds that an engine failed in.", ["engine"], registry=self.registry
        )
        self._server: tuple[WSGIServer, threading.Thread] | None = None

    def count(self, report: Report) -> None:
        """Take in a round that began, committed or not."""
        outcome = "aborted" if report.outcome != "committed" else "committed" if report.ok else "partly"
        self._rounds.labels(outcome).inc()
        self._round_seconds.labels(outcome).observe(report.total_s)
        for phase, seconds in report.phase_seconds().items():
            self._phase_seconds.labels(phase).observe(seconds)
        for engine in report.engines:
            if not engine.ok:
                self._failures.labels(engine.name).inc()
            for worker in engine.workers:
                self._nbytes.labels(engine.name, worker.transport).inc(worker.nbytes)

    def count_unconnected(self, engines: Mapping[str, object]) -> None:
        """Take in a publish that ended before its round began, for want of these engines."""
        self._rounds.labels("unconnected").inc()
        for name in engines:
            self._failures.labels(name).inc()

    def render(self) -> bytes:
        """The text format."""
        return generate_latest(self.registry)

    def serve(self, port: int, host: str = "127.0.0.1") -> int:
        """Serve ``/metrics`` until ``close``; returns the port, which 0 lets the system choose."""
        try:
            server, thread = start_http_server(port, host, self.registry)
        except (OSError, OverflowError, TypeError) as error:
            raise InvalidInput(
                f"cannot serve metrics on {host}:{port!r}: {error}",
                field="metrics_port",
                hint="Give a free port from 1 to 65535, or 0 to have one chosen",
            ) from None
        self._server = (server, thread)
        return int(server.server_port)

    def close(self) -> None:
        """Free the port; idempotent."""
        if self._server is not None:
            server, thread = self._server
            self._server = None
            server.shutdown()
            server.server_close()
            thread.join()


class _Members(Collector):
    def __init__(self, members: Callable[[], Mapping[str, str]], versions: Callable[[], Mapping[str, str]]) -> None:
        self._members, self._versions = members, versions

    def collect(self) -> Iterator[Metric]:
        states = {"ready": 0, "dirty": 0, "unknown": 0, "absent": 0}
        for state in self._members().values():
            states[state if state in states else "absent"] += 1
        count = GaugeMetricFamily("weightcast_members", "Engines of the fleet by state.", labels=["state"])
        for state, number in states.items():
            count.add_metric([state], number)
        yield count
        served = GaugeMetricFamily(
            "weightcast_member_version_info", "What each engine serves, in labels.", labels=["engine", "version"]
        )
        for engine, version in self._versions().items():
            served.add_metric([engine, version], 1.0)
        yield served
