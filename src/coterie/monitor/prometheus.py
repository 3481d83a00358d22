"""Figures of calls as a Prometheus endpoint: its own registry, its own small server, on this machine only by default.

endpoint = PrometheusEndpoint()
endpoint.start(port=9400)          # http://127.0.0.1:9400/metrics
... calls=EachOf(statistics, endpoint) ...
endpoint.stop()
"""

from __future__ import annotations

import threading
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from coterie.errors import ConfigError
from coterie.inference.calls import CallRecord
from coterie.inference.ladder import TierStatus

BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class PrometheusEndpoint:
    """A `CallSink` that shows counters and histograms to whoever scrapes them.

    coterie_calls_total{tier,server,outcome}, coterie_call_latency_seconds{tier,server},
    coterie_call_queued_seconds{tier}, coterie_prompt_tokens_total{tier,model},
    coterie_completion_tokens_total{tier,model}, coterie_tier_up{tier}
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self._calls = Counter("coterie_calls", "Attempts by outcome.", ("tier", "server", "outcome"), registry=r)
        self._latency = Histogram(
            "coterie_call_latency_seconds", "From sending to the whole answer.", ("tier", "server"), registry=r,
            buckets=BUCKETS_S,
        )  # fmt: skip
        self._queued = Histogram(
            "coterie_call_queued_seconds", "Waiting here for a place at a server.", ("tier",), registry=r,
            buckets=BUCKETS_S,
        )  # fmt: skip
        self._prompt = Counter("coterie_prompt_tokens", "Of answered calls.", ("tier", "model"), registry=r)
        self._completion = Counter("coterie_completion_tokens", "Generated.", ("tier", "model"), registry=r)
        self._up = Gauge("coterie_tier_up", "1 when the tier can answer.", ("tier",), registry=r)
        self._running: tuple[WSGIServer, threading.Thread] | None = None

    def call(self, record: CallRecord) -> None:
        """Count one attempt."""
        tier = str(record.tier)
        self._calls.labels(tier, record.server, record.outcome).inc()
        if record.outcome == "ok":
            self._latency.labels(tier, record.server).observe(record.latency_s)
            self._queued.labels(tier).observe(record.queued_s)
            self._prompt.labels(tier, record.model).inc(record.prompt_tokens)
            self._completion.labels(tier, record.model).inc(record.completion_tokens)

    def tiers(self, status: tuple[TierStatus, ...]) -> None:
        """Show which tiers are up."""
        for tier in status:
            self._up.labels(str(tier.tier)).set(float(tier.up))

    def start(self, port: int = 0, address: str = "127.0.0.1") -> str:
        """Serve in a thread; returns the url. `port` 0: a free one. Started already: nothing changes.

        Raises:
            ConfigError: the address cannot be used.
        """
        if self._running is None:
            try:
                self._running = start_http_server(port, addr=address, registry=self.registry)
            except OSError as error:
                raise ConfigError(
                    f"cannot serve metrics at {address}:{port}: {error.strerror}; choose another"
                ) from error
        return self.url

    @property
    def url(self) -> str:
        """Where it is served; empty when it is not."""
        if self._running is None:
            return ""
        host, port = self._running[0].server_address[:2]
        return f"http://{host if isinstance(host, str) else host.decode()}:{port}/metrics"

    def stop(self) -> None:
        """Serve no more; figures are kept. Stopping twice is fine."""
        running, self._running = self._running, None
        if running is not None:
            server, thread = running
            server.shutdown()
            server.server_close()
            thread.join()
