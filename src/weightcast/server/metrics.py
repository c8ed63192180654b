"""Prometheus metrics of one application, in a registry of its own: several applications in a process do not mix."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from weightcast.engines.base import EngineStatus, RequestOutput
from weightcast.server.operation import SCOPE_ROUTE

CONTENT_TYPE = CONTENT_TYPE_LATEST

_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class ServerMetrics:
    """Counters that routes feed; ``render`` adds what the engine says about itself at that moment."""

    content_type = CONTENT_TYPE

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._engine = _EngineCollector()
        self.registry.register(self._engine)
        self.requests = Counter(
            "weightcast_http_requests", "HTTP requests by route and status.", ["route", "code"], registry=self.registry
        )
        self.seconds = Histogram(
            "weightcast_http_request_seconds",
            "Time to the end of the answer.",
            ["route"],
            buckets=_LATENCY_S,
            registry=self.registry,
        )
        self.first_byte_seconds = Histogram(
            "weightcast_http_first_byte_seconds",
            "Time to the first byte of the answer's body.",
            ["route"],
            buckets=_LATENCY_S,
            registry=self.registry,
        )
        self.prompt_tokens = Counter("weightcast_prompt_tokens", "Prompt tokens answered.", registry=self.registry)
        self.output_tokens = Counter("weightcast_output_tokens", "Output tokens answered.", registry=self.registry)
        self.weight_seconds = Histogram(
            "weightcast_weight_operation_seconds",
            "Duration of weight operations.",
            ["operation", "outcome"],
            buckets=_LATENCY_S,
            registry=self.registry,
        )
        self.phase_seconds = Histogram(
            "weightcast_weight_phase_seconds",
            "Duration of the phases of a commit or roll-back; requests stand still from pause to resume.",
            ["operation", "phase"],
            buckets=(0.0005, 0.001, 0.0025, *_LATENCY_S),
            registry=self.registry,
        )

    def observe_phases(self, operation: str, phases: Mapping[str, float]) -> None:
        """Take in how long each phase of a commit or roll-back took."""
        for phase, seconds in phases.items():
            self.phase_seconds.labels(operation, phase).observe(seconds)

    def count_tokens(self, prompts: Iterable[RequestOutput]) -> None:
        """Add an answered request's tokens."""
        for prompt in prompts:
            self.prompt_tokens.inc(len(prompt.prompt_token_ids))
            self.output_tokens.inc(sum(len(output.token_ids) for output in prompt.outputs))

    @contextmanager
    def time_weight_operation(self, operation: str) -> Iterator[None]:
        """Observe how long a weight operation took and whether it failed."""
        started, outcome = time.perf_counter(), "error"
        try:
            yield
            outcome = "ok"
        finally:
            self.weight_seconds.labels(operation, outcome).observe(time.perf_counter() - started)

    def render(self, status: EngineStatus | None) -> bytes:
        """The text format. ``status`` None: the engine does not answer."""
        self._engine.status = status
        return generate_latest(self.registry)


class MetricsMiddleware:
    """Counts and times every request under its route's pattern, so that labels stay few."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, code, first_byte_s = time.perf_counter(), "none", None

        async def observe(message: Message) -> None:
            nonlocal code, first_byte_s
            if message["type"] == "http.response.start":
                code = str(message["status"])
            elif first_byte_s is None and message.get("body"):
                first_byte_s = time.perf_counter() - started
            await send(message)

        try:
            await self._app(scope, receive, observe)
        finally:
            route = scope.get(SCOPE_ROUTE, "unmatched")
            self._metrics.requests.labels(route, code).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - started)
            if first_byte_s is not None:
                self._metrics.first_byte_seconds.labels(route).observe(first_byte_s)


class _EngineCollector(Collector):
    status: EngineStatus | None = None

    def collect(self) -> Iterator[Metric]:
        status = self.status
        yield GaugeMetricFamily("weightcast_engine_up", "Whether the engine answers.", float(status is not None))
        if status is None:
            return
        info = GaugeMetricFamily(
            "weightcast_weight_version_info", "The live version, in labels.", labels=["version", "digest", "model"]
        )
        info.add_metric([status.weight_version, status.digest or "", status.model], 1.0)
        yield info
        yield from _adapter_metrics(status)
        for name, text, value in (
            ("ready", "Whether requests are served.", status.ready),
            ("dirty", "Whether live weights belong to no version.", status.dirty),
            ("paused", "Whether generation is paused.", status.paused),
            ("requests_running", "Requests being generated.", status.num_running),
            ("requests_waiting", "Requests in the queue.", status.num_waiting),
            ("kv_tokens", "Tokens in the KV cache.", status.num_kv_tokens),
            ("kv_capacity_tokens", "Tokens that fit in the KV cache.", status.kv_capacity_tokens),
            ("kv_usage_ratio", "Used part of the KV cache.", _usage(status)),
        ):
            if value is not None:
                yield GaugeMetricFamily(f"weightcast_{name}", text, float(value))
        for name, text, count in (
            ("generated_tokens", "Tokens generated by the engine.", status.num_generated_tokens),
            ("preemptions", "Requests set back for lack of KV space.", status.num_preemptions),
            ("syncs", "Weight updates that reached the live weights.", status.num_syncs),
        ):
            if count is not None:
                yield CounterMetricFamily(f"weightcast_{name}", text, float(count))
        if status.num_weight_bytes is not None:
            text, received = "Bytes of weights received.", float(status.num_weight_bytes)
            yield CounterMetricFamily("weightcast_weight_bytes", text, received)


def _adapter_metrics(status: EngineStatus) -> Iterator[Metric]:
    """What is served beside the model."""
    info = GaugeMetricFamily(
        "weightcast_adapter_version_info",
        "The live version of each LoRA adapter, in labels.",
        labels=["adapter", "version", "digest"],
    )
    requests = GaugeMetricFamily(
        "weightcast_adapter_requests",
        "Requests that run on each version of a LoRA adapter.",
        labels=["adapter", "version"],
    )
    for name, served in status.adapters.items():
        info.add_metric([name, served.weight_version, served.digest or ""], 1.0)
        for version, count in served.versions.items():
            requests.add_metric([name, version], float(count))
    if status.adapters:
        yield info
        yield requests


def _usage(status: EngineStatus) -> float | None:
    """The used part of the KV cache, where the engine tells."""
    used, capacity = status.num_kv_tokens, status.kv_capacity_tokens
    return None if used is None or not capacity else used / capacity
