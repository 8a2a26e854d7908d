"""What `overlap_profile.py` says of its prediction, its measurement and its timeline."""

from collections.abc import Mapping, Sequence
from typing import Any

from _bucket_model import Alone, Bucket, Wire
from _overlap_variants import VARIANTS, WITH, WITHOUT

from distlab.run import Run


def report_alone(run: Run, alone: Alone, wire: Wire, own: Sequence[Bucket]) -> None:
    """What the prediction knows."""
    run.metric("gradient", alone.gradient_bytes, "B", f"{len(own)} buckets")
    run.metric("forward", alone.forward, "s", "nothing sent, all ranks at once")
    run.metric("backward", alone.backward, "s")
    run.metric("latency", wire.latency, "s", "of an all-reduce, besides its bytes")
    sent = sum(bucket.size for bucket in own) * wire.per_byte
    run.metric("communication", sent, "s", "of all buckets' bytes")
    work = sum(wire.working(bucket.size) for bucket in own)
    run.metric("work", work, "s", "of a core for communication, while backward stands still")


def report_prediction(run: Run, predicted: Mapping[str, float]) -> None:
    """Before anything is measured."""
    words = ", ".join(f"{1e3 * predicted[name]:.1f} ms {name}" for name in VARIANTS)
    run.print(f"predicted: {words}: a speed-up of {predicted[WITHOUT] / predicted[WITH]:.2f}")


def report_measured(
    run: Run, predicted: Mapping[str, float], measured: Mapping[str, float]
) -> float:
    """Each variant's step beside its prediction; the measured speed-up."""
    for name in VARIANTS:
        run.compare(f"a step {name}", predicted[name], measured[name], "s")
    speed_up = measured[WITHOUT] / measured[WITH]
    run.compare("speed-up by overlap", predicted[WITHOUT] / predicted[WITH], speed_up)
    return speed_up


def draw_timeline(run: Run, rows: Sequence[dict[str, Any]]) -> None:
    run.figure(
        "timeline", kind="timeline", title="One step with overlap, and one without",
        x_label="ms since forward began", y_label="", series=rows,
    )  # fmt: skip
