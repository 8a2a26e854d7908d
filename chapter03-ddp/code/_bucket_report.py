"""What `bucket_tuning.py` says of one link, and of all of them."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from _bucket_model import MIB, Alone, Wire, bucket_limits, ddp_buckets, predict_step

from distlab.measure import Timing
from distlab.run import Run
from distlab.runtime import Runtime

COLUMNS = [
    "bucket (MiB)", "buckets", "latency*", "sent*", "sticks out*", "step*", "step", "error %",
]  # fmt: skip
CAPTION = (
    "ms, medians; * predicted; latency: of all buckets, a part of sent; sent: one after another; "
    "bucket —: DDP's default, 1 MiB for the first and 25 for the others"
)
BUCKET, STICKS_OUT, PREDICTED, MEASURED = 0, 4, 5, 6


def report_link(
    run: Run,
    job: Runtime,
    caps: Sequence[float | None],
    timings: Sequence[Timing],
    alone: Alone,
    wire: Wire,
    made: Sequence[Sequence[int]],
) -> None:
    """Every bucket size on one link; `made` are the buckets that DDP has made of each."""
    run.metric("gradient", alone.gradient_bytes, "B", f"{len(alone.sizes)} tensors")
    run.metric("forward", alone.forward, "s", "nothing sent, all ranks at once")
    run.metric("backward", alone.backward, "s")
    run.metric("latency", wire.latency, "s", "of an all-reduce, besides its bytes")
    all_bytes = alone.gradient_bytes * wire.per_byte
    run.metric("all_reduce", all_bytes, "s", "of all gradients' bytes")
    rows, expected = [], []
    for cap, timing in zip(caps, timings, strict=True):
        buckets = ddp_buckets(alone, bucket_limits(cap))
        expected.append([bucket.size for bucket in buckets])
        guess = predict_step(alone, wire, buckets)
        seconds = [guess.latency, guess.sent, guess.sticks_out, guess.step, timing.median]
        error = 100 * (guess.step - timing.median) / timing.median
        rows.append([cap, len(buckets), *(1e3 * s for s in seconds), error])
    run.table("buckets", COLUMNS, rows, caption=CAPTION)
    run.check_equal("DDP's buckets are those predicted", [list(m) for m in made], expected)
    run.extra(link={"rows": rows, "alone": vars(alone), "wire": vars(wire)})


def report_tuning(run: Run, args: Namespace, links: Mapping[str, Mapping[str, Any]]) -> None:
    """The tables and the curves of all links, the best bucket of each, and the checks."""
    run.table(
        "links",
        ["link (Mbit/s)", "forward", "backward", "optimizer", "latency", "all-reduce", "work"],
        [[link["mbit"], *known(link)] for link in links.values()],
        caption="what the predictions know, ms: a step with nothing sent; of an all-reduce its "
        "latency; of all gradients the time on the link, and how long backward stands still for it",
    )
    rows: list[list[Any]] = [
        [link["mbit"], *row] for link in links.values() for row in link["rows"]
    ]
    run.table("tuning", ["link (Mbit/s)", *COLUMNS], rows, caption=f"{CAPTION}; link —: unshaped")
    draw(run, links)
    chosen, slowdowns = [], []
    for rate, link in links.items():
        sizes = [row for row in link["rows"] if row[BUCKET] is not None]
        best = min(sizes, key=lambda row: row[MEASURED])
        guess = min(sizes, key=lambda row: row[PREDICTED])
        largest = sizes[-1]
        chosen.append(guess[MEASURED] / best[MEASURED])
        slowdowns.append(
            (largest[PREDICTED] / guess[PREDICTED], largest[MEASURED] / guess[MEASURED])
        )
        run.print(f"verdict: {rate}: {in_words(best, guess, largest)}")
    worst = max(abs(row[-1]) for row in rows)
    run.check_below("the worst error of a predicted step", worst, 100 * args.tolerance, "%")
    run.check_below("a step with the predicted best bucket, over the best measured", max(chosen),
                    1 + args.tolerance)  # fmt: skip
    predicted, measured = max(slowdowns)
    run.compare("slowdown by the largest bucket, where it is largest", predicted, measured)
    run.check_above("that slowdown", measured, predicted / (1 + args.tolerance))


def known(link: Mapping[str, Any]) -> list[float]:
    """Milliseconds."""
    alone, wire = Alone(**link["alone"]), Wire(**link["wire"])
    n = alone.gradient_bytes
    parts = [alone.forward, alone.backward, alone.optimizer, wire.latency, wire.seconds(n)]
    return [1e3 * seconds for seconds in [*parts, wire.working(n)]]


def in_words(best: Sequence[Any], guess: Sequence[Any], largest: Sequence[Any]) -> str:
    """The best bucket, and why the smallest and the largest are not."""
    return (
        f"{best[BUCKET]:g} MiB is the fastest with {best[MEASURED]:.1f} ms (predicted: "
        f"{guess[BUCKET]:g} MiB); of {largest[BUCKET]:g} MiB {largest[STICKS_OUT]:.1f} ms stick "
        f"out of backward, of {guess[BUCKET]:g} MiB {guess[STICKS_OUT]:.1f}"
    )


def draw(run: Run, links: Mapping[str, Mapping[str, Any]]) -> None:
    """Step time over bucket size; a limit above the whole gradient stands at the gradient's."""
    series = []
    for rate, link in links.items():
        most = sum(link["alone"]["sizes"]) / MIB
        sizes = [row for row in link["rows"] if row[BUCKET] is not None]
        x = [min(row[BUCKET], most) for row in sizes]
        for label, column in (("measured", MEASURED), ("predicted", PREDICTED)):
            y = [row[column] for row in sizes]
            dashed = column == PREDICTED
            series.append({"label": f"{rate}, {label}", "x": x, "y": y, "dashed": dashed})
    run.figure(
        "buckets", kind="line", title="A step of DDP, by the size of its buckets",
        x_label="bucket (MiB); the last: one bucket for all", y_label="step (ms)",
        log_x=True, series=series,
    )  # fmt: skip
