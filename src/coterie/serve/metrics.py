"""Metrics under vLLM's names, so that routers and dashboards made for vLLM read them.

Every label "engine" is "0". Waiting sequences have no token yet; running ones have.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from coterie.serve.engine import TokenEngine
from coterie.serve.generation import Answer

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_BETWEEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_WHOLE = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0)
_NS = (1, 2, 5, 10, 20)


class ServeMetrics:
    """What one server counts, in a registry of its own."""

    def __init__(self, engine: TokenEngine, model: str, max_adapters: int) -> None:
        self.registry = CollectorRegistry()
        self._labels = (model, "0")
        self._max_adapters = max_adapters
        self._in_flight: dict[Answer, str | None] = {}
        names = ("model_name", "engine")

        def histogram(name: str, what: str, buckets: Sequence[float]) -> Histogram:
            made = Histogram(name, what, names, registry=self.registry, buckets=buckets)
            return made.labels(*self._labels)

        def counter(name: str, what: str) -> Counter:
            return Counter(name, what, names, registry=self.registry).labels(*self._labels)

        def gauge(name: str, what: str) -> Gauge:
            return Gauge(name, what, names, registry=self.registry).labels(*self._labels)

        gauge("vllm:num_requests_running", "Sequences being decoded.").set_function(lambda: self._phase(begun=True))
        gauge("vllm:num_requests_waiting", "Sequences without a token yet.").set_function(
            lambda: self._phase(begun=False)
        )
        gauge("vllm:kv_cache_usage_perc", "KV-cache usage; 1 means 100 percent.").set_function(
            lambda: engine.stats().cache_usage
        )
        self._prompt = counter("vllm:prompt_tokens", "Prompt tokens processed.")
        self._generated = counter("vllm:generation_tokens", "Tokens generated.")
        self._success = Counter(
            "vllm:request_success", "Sequences finished.", (*names, "finished_reason"), registry=self.registry
        )
        self._first = histogram("vllm:time_to_first_token_seconds", "Time to first token.", _FIRST)
        self._between = histogram("vllm:inter_token_latency_seconds", "Time between tokens.", _BETWEEN)
        self._whole = histogram("vllm:e2e_request_latency_seconds", "Whole time of a sequence.", _WHOLE)
        self._prompt_length = histogram("vllm:request_prompt_tokens", "Prompt tokens of a sequence.", _TOKENS)
        self._length = histogram("vllm:request_generation_tokens", "Generated tokens of a sequence.", _TOKENS)
        self._n = histogram("vllm:request_params_n", "The n of a request.", _NS)
        self._limit = histogram("vllm:request_params_max_tokens", "The max_tokens of a request.", _TOKENS)
        self._adapters = Gauge(
            "vllm:lora_requests_info",
            "Unix time of the last change in which adapters have running or waiting sequences.",
            ("max_lora", "waiting_lora_adapters", "running_lora_adapters"),
            registry=self.registry,
        )
        self.registry.register(_PrefixCache(engine, names, self._labels))

    @property
    def in_flight(self) -> int:
        """Sequences that are not finished."""
        return len(self._in_flight)

    @contextmanager
    def following(self, answers: Sequence[Answer], adapter: str | None) -> Iterator[None]:
        """Count these answers while the block lasts, and what became of them at its end.

        Args:
            adapter: served name they are made under; None: the base.
        """
        self._in_flight.update(dict.fromkeys(answers, adapter))
        for answer in answers[:1]:
            self._n.observe(answer.plan.n)
            self._limit.observe(answer.plan.request.max_tokens)
        try:
            yield
        finally:
            for answer in answers:
                del self._in_flight[answer]
                self._finished(answer)

    def _finished(self, answer: Answer) -> None:
        prompt = len(answer.plan.request.prompt_ids)
        self._prompt.inc(prompt)
        self._generated.inc(len(answer.tokens))
        self._success.labels(*self._labels, answer.finish_reason or "abort").inc()
        self._prompt_length.observe(prompt)
        self._length.observe(len(answer.tokens))
        self._whole.observe(time.perf_counter() - answer.born)
        if answer.times:
            self._first.observe(answer.times[0] - answer.born)
        for before, after in zip(answer.times, answer.times[1:], strict=False):
            self._between.observe(after - before)

    def _phase(self, *, begun: bool) -> float:
        return float(sum(bool(answer.tokens) is begun for answer in self._in_flight))

    def exposition(self) -> bytes:
        """The text of /metrics."""
        waiting = {name for answer, name in self._in_flight.items() if name is not None and not answer.tokens}
        running = {name for answer, name in self._in_flight.items() if name is not None and answer.tokens}
        self._adapters.clear()
        self._adapters.labels(str(self._max_adapters), ",".join(sorted(waiting)), ",".join(sorted(running))).set(
            time.time()
        )
        return generate_latest(self.registry)


class _PrefixCache(Collector):
    """The engine's own counters, read when asked for."""

    def __init__(self, engine: TokenEngine, names: tuple[str, ...], labels: tuple[str, ...]) -> None:
        self._engine, self._names, self._labels = engine, names, labels

    def collect(self) -> Iterator[Any]:
        stats = self._engine.stats()
        for name, what, value in (
            ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_queries),
            ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_hits),
        ):
            family = CounterMetricFamily(name, what, labels=self._names)
            family.add_metric(self._labels, float(value))
            yield family
