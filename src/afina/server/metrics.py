"""Prometheus metrics: counters of the server, and gauges of engine and adapters at each scrape.

Every registered adapter is listed, used or not, with the location of its tensors.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from afina.engine.encoder_engine import EncoderEngine
from afina.engine.engine import Engine

ADAPTER_STATES = ("disk", "host", "device", "merged")
LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class ServerMetrics:
    """All metrics of one server."""

    def __init__(self, engine: Engine | EncoderEngine, base: str) -> None:
        self.registry, self._base = CollectorRegistry(), base
        options: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter(
            "afina_http_requests", "Requests by path and status", ["path", "status"], **options
        )
        self.first = Histogram(
            "afina_time_to_first_token_seconds",
            "From a request to its first token",
            ["model"],
            buckets=LATENCY_BUCKETS,
            **options,
        )
        self.last = Histogram(
            "afina_request_seconds",
            "From a request to its last token",
            buckets=LATENCY_BUCKETS,
            **options,
        )
        self.read = Counter("afina_prompt_tokens", "Prompt tokens", ["model"], **options)
        self.cached = Counter(
            "afina_cached_prompt_tokens",
            "Prompt tokens found in the prefix cache",
            ["model"],
            **options,
        )
        self.written = Counter("afina_completion_tokens", "Completion tokens", ["model"], **options)
        self.jobs = Counter("afina_jobs", "Fine-tuning jobs by final status", ["status"], **options)
        self.registry.register(EngineCollector(engine))  # type: ignore[arg-type]

    def models(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Return the labels under which a request is counted: its adapters, or the base."""
        return names or (self._base,)

    def forget(self, name: str) -> None:
        """Remove the metrics of an adapter; they restart from zero if its name returns."""
        for metric in (self.first, self.read, self.cached, self.written):
            metric.remove_by_labels({"model": name})

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class EngineCollector:
    """The gauges of engine and adapters."""

    def __init__(self, engine: Engine | EncoderEngine) -> None:
        self.engine = engine

    def collect(self) -> Iterable[Any]:
        """Yield all metric families; called at each scrape."""
        yield from self._engine()
        labels = ["adapter"]
        state = GaugeMetricFamily(
            "afina_adapter_state",
            "Location of the tensors of an adapter",
            labels=["adapter", "state"],
        )
        hits = CounterMetricFamily(
            "afina_adapter_hits", "Requests that used the adapter", labels=labels
        )
        tokens = CounterMetricFamily(
            "afina_adapter_tokens", "Tokens generated with the adapter", labels=labels
        )
        load = GaugeMetricFamily(
            "afina_adapter_load_seconds",
            "Seconds that the last load of the adapter took",
            labels=labels,
        )
        size = GaugeMetricFamily(
            "afina_adapter_bytes", "Size of the adapter in bytes", labels=labels
        )
        for entry in self.engine.registry.list_adapters():
            for name in ADAPTER_STATES:
                state.add_metric([entry.name, name], float(entry.state == name))
            for family, value in (
                (hits, entry.hits),
                (tokens, entry.tokens),
                (load, entry.load_seconds),
                (size, entry.bytes),
            ):
                family.add_metric([entry.name], value)
        yield from (state, hits, tokens, load, size)

    def _engine(self) -> Iterator[Any]:
        """Yield the engine's stats; a stat by adapter has the adapter's name as a label."""
        for name, value in self.engine.stats().items():
            if isinstance(value, dict):
                family = GaugeMetricFamily(
                    f"afina_engine_{name}", f"The engine's {name}, by adapter", labels=["adapter"]
                )
                for label, part in value.items():
                    family.add_metric([str(label)], float(part))
                yield family
            elif isinstance(value, int | float):
                yield GaugeMetricFamily(
                    f"afina_engine_{name}", f"The engine's {name}", value=float(value)
                )
