"""What an inference server tells at /metrics, whatever prefix its names have."""

from collections import defaultdict
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from distlab.errors import RunError

PREFIXES = ("vllm:", "paged_engine:")


@dataclass(frozen=True)
class Metrics:
    """One reading: each name without its prefix, summed over its labels (models, engines, ...)."""

    prefix: str
    values: dict[str, float]

    def __getitem__(self, name: str) -> float:
        return self.values.get(name, 0.0)  # a counter with labels has no line before it counts

    def grown(self, counter: str, before: "Metrics") -> float:
        """How much a counter has grown since `before`."""
        return self[counter] - before[counter]

    def mean_since(self, histogram: str, before: "Metrics") -> float | None:
        """The mean of what a histogram has observed since `before`; None if nothing."""
        count = self.grown(f"{histogram}_count", before)
        return self.grown(f"{histogram}_sum", before) / count if count else None


def parse(text: str, source: str) -> Metrics:
    """Read Prometheus' text format. Raises `RunError` when it is none, or no inference server's."""
    values: dict[str, dict[str, float]] = {prefix: defaultdict(float) for prefix in PREFIXES}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                for prefix in PREFIXES:
                    if sample.name.startswith(prefix):
                        values[prefix][sample.name.removeprefix(prefix)] += sample.value
    except ValueError as error:
        raise RunError(f"{source} is no Prometheus text: {error}") from error
    for prefix, found in values.items():
        if "num_requests_running" in found:
            return Metrics(prefix, dict(found))
    raise RunError(
        f"{source} has no metric {' or '.join(p + 'num_requests_running' for p in PREFIXES)}; "
        "point --base-url at a server of vLLM or paged_engine"
    )
