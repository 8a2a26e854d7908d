"""What /metrics tells Prometheus: vLLM's names and meanings, under the prefix `paged_engine:`.

A dashboard made for vLLM works after replacing the prefix. Each server has a registry of its own,
so that two in one process do not mix. Sequences are counted where the name says requests, as vLLM
does: a request with n = 4 is four.
"""

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from paged_engine.engine import EngineStats

PREFIX = "paged_engine:"
LABELS = ["model_name"]
FIRST_TOKEN_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0,
)  # fmt: skip
BETWEEN_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
    5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_SECONDS = (
    0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
    120.0, 240.0, 480.0, 960.0, 1920.0,
)  # fmt: skip
FINISHED_REASONS = {"stop": "stop", "length": "length", "cancelled": "abort"}  # ours: vLLM's
GAUGES = {
    "num_requests_running": ("num_running", "Sequences in the running batch"),
    "num_requests_waiting": ("num_waiting", "Sequences waiting for room in it"),
    "kv_cache_usage_perc": ("kv_cache_usage", "Used share of the cache's blocks; 1 is full"),
}
COUNTERS = {
    "prefix_cache_queries": ("prefix_cache_queries", "Tokens looked up in the prefix cache"),
    "prefix_cache_hits": ("prefix_cache_hits", "Tokens found in the prefix cache"),
    "num_preemptions": ("num_preemptions", "Preemptions since the start"),
    "prompt_tokens": ("prompt_tokens", "Tokens of the prompts whose first token is out"),
    "generation_tokens": ("generation_tokens", "Tokens generated"),
}


class Metrics(Collector):
    """`stats` is the engine's latest EngineStats, replaced as a whole by the engine's thread."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.stats: EngineStats | None = None
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.rejections = self._counter("admission_rejections", "Requests refused: queue full")
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token", FIRST_TOKEN_SECONDS
        )
        self.between = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a sequence", BETWEEN_SECONDS
        )
        self.latency = self._histogram(
            "e2e_request_latency_seconds", "From arrival to the last token", REQUEST_SECONDS
        )
        success = Counter(
            PREFIX + "request_success",
            "Sequences that ended, by reason",
            [*LABELS, "finished_reason"],
            registry=self.registry,
        )
        self.success = {
            reason: success.labels(model, theirs) for reason, theirs in FINISHED_REASONS.items()
        }

    def finished(self, reason: str, sequences: int = 1) -> None:
        self.success[reason].inc(sequences)

    def rejected(self) -> None:
        self.rejections.inc()

    def collect(self) -> Iterable[Metric]:
        """What the engine itself counts; Prometheus's client calls this at each scrape."""
        return self._engine_metrics(self.stats) if self.stats else ()

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def _engine_metrics(self, stats: EngineStats) -> Iterator[Metric]:
        for name, (attribute, meaning) in GAUGES.items():
            gauge = GaugeMetricFamily(PREFIX + name, meaning, labels=LABELS)
            gauge.add_metric([self.model], getattr(stats, attribute))
            yield gauge
        for name, (attribute, meaning) in COUNTERS.items():
            counter = CounterMetricFamily(PREFIX + name, meaning, labels=LABELS)
            counter.add_metric([self.model], getattr(stats, attribute))
            yield counter

    def _counter(self, name: str, meaning: str) -> Counter:
        counter = Counter(PREFIX + name, meaning, LABELS, registry=self.registry)
        return counter.labels(self.model)

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(
            PREFIX + name, meaning, LABELS, registry=self.registry, buckets=buckets
        )
        return histogram.labels(self.model)
