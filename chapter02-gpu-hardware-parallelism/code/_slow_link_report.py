"""What `slow_link_scaling.py` says of one job, and of the whole scaling curve."""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from _microbench_model import Link
from _slow_link_training import Measured

from distlab.run import Run
from distlab.runtime import Runtime


def report_point(run: Run, job: Runtime, measured: Measured, link: Link | None) -> None:
    """One number of nodes on one link: the step, predicted where the link is known."""
    run.metric("gradient", measured.gradient_bytes, "B")
    run.metric("compute", measured.compute, "s", "all ranks at once, or as --compute says")
    run.metric("all_reduce", measured.all_reduce, "s", "within the step")
    efficiency = 100 * measured.compute / measured.step
    run.metric("efficiency", efficiency, "%", "compute / step")
    all_reduce = None
    if link is not None:
        all_reduce = link.seconds(
            "all_reduce", measured.gradient_bytes, job.world_size, job.backend
        )
        run.compare("a step", measured.compute + all_reduce, measured.step, "s")
    run.extra(point={**vars(measured), "nodes": job.world_size, "predicted_all_reduce": all_reduce})


def report_scaling(run: Run, args: Namespace, points: Sequence[dict[str, Any]]) -> None:
    """The table and the curves of `points`, of which the first is one node alone."""
    one_step = points[0]["step"]  # nothing is sent in it, so it is all compute
    alone, *rows = [row_of({**point, "compute": one_step}) for point in points]
    run.table(
        "scaling",
        ["link", "K", "compute", "all-reduce*", "step*", "step", "error %", "efficiency* %",
         "efficiency %", "strong* %"],
        [alone, *rows],
        caption=f"Weak scaling, {points[0]['gradient_bytes']:,} bytes of gradient; ms, medians of "
        f"{args.steps} steps; * predicted; strong: one node's batch split",
    )  # fmt: skip
    series = []
    for rate in args.rates:
        own = [alone, *(row for row in rows if row[0] == rate)]
        for label, column in (("measured", 8), ("predicted", 7)):
            series.append(
                {
                    "label": f"{rate}, {label}",
                    "x": [row[1] for row in own],
                    "y": [row[column] for row in own],
                }
            )
    run.figure(
        "scaling", kind="line", title="Weak scaling on a slow link", x_label="nodes",
        y_label="efficiency (%)", series=series,
    )  # fmt: skip
    worst = max(abs(row[6]) for row in rows)
    run.check_below("the worst error of a predicted step", worst, 100 * args.tolerance, "%")


def row_of(point: dict[str, Any]) -> list[Any]:
    compute, nodes = point["compute"], point["nodes"]
    all_reduce = point["predicted_all_reduce"] or 0.0  # None: one node without a link
    predicted, step = compute + all_reduce, point["step"]
    split = compute / nodes  # strong scaling: a K-th of the batch for each node
    return [
        point["rate"] or "none", nodes, 1e3 * compute, 1e3 * all_reduce, 1e3 * predicted,
        1e3 * step, 100 * (predicted - step) / step, 100 * compute / predicted,
        100 * compute / step, 100 * split / (split + all_reduce),
    ]  # fmt: skip
