"""Metrics of the server for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from gptx.server.models import Models

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """Counters and times of one server."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self.registry = CollectorRegistry()
        labels = ("path", "status")
        self.requests = Counter(
            "gptx_requests", "Requests answered.", labels, registry=self.registry
        )
        self.seconds = Histogram(
            "gptx_request_seconds", "Time of a request in seconds.", buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.first_token = Histogram(
            "gptx_time_to_first_token_seconds", "Time until the first token in seconds.",
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.prompt_tokens = Counter(
            "gptx_prompt_tokens", "Tokens of prompts.", registry=self.registry
        )
        self.cached_tokens = Counter(
            "gptx_cached_tokens", "Tokens of prompts that were not computed again.",
            registry=self.registry,
        )  # fmt: skip
        self.generated_tokens = Counter(
            "gptx_generated_tokens", "Tokens generated.", registry=self.registry
        )
        self.canceled = Counter(
            "gptx_canceled_requests", "Requests whose client hung up.", registry=self.registry
        )
        for name, about, of in (
            ("gptx_requests_running", "Requests in the engine.", "running"),
            ("gptx_requests_waiting", "Requests that wait for the engine.", "waiting"),
        ):
            gauge = Gauge(name, about, registry=self.registry)
            gauge.set_function(lambda of=of: self._total(of))  # type: ignore[misc]

    def _total(self, of: str) -> float:
        return float(sum(getattr(one, of) for one in self._models.loaded.values()))

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self.registry)
