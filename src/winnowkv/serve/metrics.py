"""What the server counts, for Prometheus; each server has a registry of its own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from winnowkv.engine.engine import Engine
from winnowkv.engine.request import Request

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """The metrics of one server. ``process_resident_memory_bytes`` (RSS) comes from prometheus-client, on Linux."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"winnow_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(f"winnow_{name}", text, registry=self.registry, buckets=buckets)

        self.requests = counter("requests", "Requests answered, by route and HTTP status", ("route", "status"))
        self.cancelled = counter("cancelled_requests", "Requests cancelled, by reason", ("reason",))
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts that were read")
        self.kept_entries = counter("kept_entries", "Entries kept of prompts, mean over layers and KV heads")
        self.generated = counter("generated_tokens", "Tokens generated")
        self.first_token = histogram("time_to_first_token_seconds", "From a request's arrival to the first token of a choice")
        self.between_tokens = histogram("inter_token_seconds", "From a token of a choice to its next one", TOKEN_SECONDS)
        self.queue_seconds = histogram("queue_seconds", "From a prompt's submission until the engine began to read it")

    def read(self, request: Request) -> None:
        """Count a prompt that was read, with what was kept of it."""
        self.prompt_tokens.inc(len(request.prompt))
        kept = request.report.kept_entries
        if kept and kept[0]:
            self.kept_entries.inc(sum(kept[0]) / len(kept[0]))

    def watch(self, engine: Engine, waiting: Callable[[], int]) -> None:
        """Report an engine's state whenever the metrics are read."""

        def gauge(name: str, text: str, value: Callable[[], float]) -> None:
            Gauge(f"winnow_{name}", text, registry=self.registry).set_function(value)

        gauge("queue_length", "Prompts that wait", waiting)
        gauge("active_requests", "Requests whose prompt is read or that decode", lambda: engine.active)
        gauge("kv_bytes", "Bytes of keys and values held", lambda: engine.held_bytes)
        gauge("kv_limit_bytes", "Most bytes of keys and values, 0 for no limit", lambda: engine.kv_memory or 0)

    def watch_contexts(self, used: Callable[[], float], reads: Callable[[], float]) -> None:
        """Report the memory of stored contexts whenever the metrics are read."""
        for name, text, value in (
            ("winnow_context_bytes", "Bytes of stored contexts in memory, those set aside included", used),
            ("winnow_context_reads", "Files of contexts that were read into memory", reads),
        ):
            Gauge(name, text, registry=self.registry).set_function(value)

    def page(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
