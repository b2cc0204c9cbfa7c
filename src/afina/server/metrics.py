"""Figures for Prometheus: of the server as it counts, of engine and adapters as they are when they are asked.

An adapter is there whether it is used or not, with where its tensors are now.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

if TYPE_CHECKING:
    from afina.engine.engine import Engine

STATES = ("disk", "host", "device", "merged")
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class ServerMetrics:
    """All figures of one server."""

    def __init__(self, engine: "Engine", base: str) -> None:
        self.registry, self._base = CollectorRegistry(), base
        share: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter(
            "afina_http_requests", "Requests by path and status", ["path", "status"], **share
        )
        self.first = Histogram(
            "afina_time_to_first_token_seconds",
            "From a request to its first token",
            ["model"],
            buckets=SECONDS,
            **share,
        )
        self.whole = Histogram(
            "afina_request_seconds", "From a request to its last token", buckets=SECONDS, **share
        )
        self.read = Counter("afina_prompt_tokens", "Tokens read", ["model"], **share)
        self.cached = Counter(
            "afina_cached_prompt_tokens", "Of these, out of the prefix cache", ["model"], **share
        )
        self.written = Counter("afina_completion_tokens", "Tokens written", ["model"], **share)
        self.jobs = Counter("afina_jobs", "Fine-tuning jobs by how they ended", ["status"], **share)
        self.registry.register(EngineCollector(engine))  # type: ignore[arg-type]

    def models(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The labels under which a request counts: its adapters, or the base."""
        return names or (self._base,)

    def forget(self, name: str) -> None:
        """An adapter is gone; a name that comes back starts anew."""
        for metric in (self.first, self.read, self.cached, self.written):
            metric.remove_by_labels({"model": name})

    def text(self) -> bytes:
        """All of it in Prometheus' form."""
        return generate_latest(self.registry)


class EngineCollector:
    """Engine and adapters at this moment."""

    def __init__(self, engine: "Engine") -> None:
        self.engine = engine

    def collect(self) -> Iterable[Any]:
        """Called at each look."""
        yield from self._engine()
        labels = ["adapter"]
        state = GaugeMetricFamily(
            "afina_adapter_state", "Where its tensors are", labels=["adapter", "state"]
        )
        hits = CounterMetricFamily("afina_adapter_hits", "Requests that used it", labels=labels)
        tokens = CounterMetricFamily(
            "afina_adapter_tokens", "Tokens that it acted on", labels=labels
        )
        load = GaugeMetricFamily(
            "afina_adapter_load_seconds", "How long its last loading took", labels=labels
        )
        size = GaugeMetricFamily("afina_adapter_bytes", "Its size", labels=labels)
        for entry in self.engine.registry.list_adapters():
            for name in STATES:
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
        """The engine's own figures; those by adapter have its name as a label."""
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
