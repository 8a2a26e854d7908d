"""inference_bottlenecks.py's tables, its turning point and its figures."""

from collections.abc import Sequence
from math import inf

import numpy as np
from _bottleneck_passes import Machine, Pass

from distlab import predict
from distlab.display import quantity
from distlab.predict import Architecture
from distlab.script import Run


def show_roof(run: Run, machine: Machine, dtype: str) -> None:
    run.print()
    run.metric("peak_of_matrix_products", machine.peak, "FLOP/s", dtype)
    run.metric("bandwidth_of_reading", machine.bandwidth, "B/s")
    run.metric("ridge_point", machine.ridge, "FLOP per byte")


def show_passes(
    run: Run, machine: Machine, decode: Sequence[Pass], prefill: Sequence[Pass]
) -> None:
    for what, size, passes in (
        ("decode", "sequences", decode),
        ("prefill", "tokens", prefill),
    ):
        run.print()
        rows = []
        for one in passes:
            bound = machine.bound(one)
            rows.append([
                one.size, one.intensity, one.intensity / machine.ridge, 1e3 * bound,
                1e3 * one.seconds, 100 * bound / one.seconds, one.rate,
            ])  # fmt: skip
        columns = ["FLOPs/byte", "÷ ridge", "bound, ms", "measured, ms", "% of roof", "tok/s"]
        run.table(
            what,
            [size, *columns],
            rows,
            caption=f"A {what} pass. Limited by memory where ÷ ridge is below 1; "
            "bound = max(FLOPs / peak, bytes / bandwidth)",
        )
    for one in (decode[0], decode[-1], prefill[-1]):
        run.compare(f"time of a {one.name}", machine.bound(one), one.seconds, "s")


def show_turn(run: Run, machine: Machine, a: Architecture, decode: Sequence[Pass]) -> None:
    """Where decode turns from memory to compute: by the formula, and where two measured lines meet.

    The lines are the flat one through the smallest batch's step time, and the one from zero through
    the largest batch's: they meet at the ratio of the two rates.
    """
    run.print()
    batch, context = turning_batch(machine, decode), turning_context(machine, a, decode)
    run.metric("batch_where_decode_turns", batch, note="by the formula; unknown: no batch does")
    run.metric(
        "context_from_which_no_batch_turns", context, note="tokens; unknown: batching always helps"
    )
    measured = decode[-1].rate / decode[0].rate * decode[0].size
    run.compare(
        "turning batch, as far as it was swept", min(batch or inf, decode[-1].size), measured
    )
    where = "never" if batch is None else f"at a batch of {batch:.3g}"
    run.print(
        f"verdict: decode turns from memory to compute {where} by the formula; measured, a batch "
        f"of {decode[-1].size} makes {decode[-1].rate / decode[0].rate:.3g} times the tokens of "
        f"{decode[0].size}, {quantity(decode[-1].rate, 'tok/s')}"
    )


def turning_batch(machine: Machine, decode: Sequence[Pass]) -> float | None:
    """B* = (W / M) / (f / P - C / M); None where the cache alone takes longer than the arithmetic.

    Both are straight lines in the batch, so two steps give W, C and f.
    """
    first, last = decode[0], decode[-1]
    own_bytes = (last.bytes_moved - first.bytes_moved) / (last.size - first.size)
    weights = first.bytes_moved - first.size * own_bytes
    saved = first.flops / first.size / machine.peak - own_bytes / machine.bandwidth
    return weights / machine.bandwidth / saved if saved > 0 else None


def turning_context(machine: Machine, a: Architecture, decode: Sequence[Pass]) -> float | None:
    """Tokens of context at which a sequence's cache takes as long to read as its arithmetic.

    2·N / P over the time that one more token costs, C / M less its attention's FLOPs / P; None
    where attention is limited by compute as well.
    """
    first, last = decode[0], decode[-1]
    own_bytes = (last.bytes_moved - first.bytes_moved) / (last.size - first.size)
    attention = predict.forward_flops_per_token(a, 1) - 2 * predict.matmul_parameters(a)
    seen = first.attention / first.size / attention  # tokens
    cost = own_bytes / (seen + 1) / machine.bandwidth - attention / machine.peak
    return 2 * predict.matmul_parameters(a) / machine.peak / cost if cost > 0 else None


def draw(run: Run, machine: Machine, decode: Sequence[Pass], prefill: Sequence[Pass]) -> None:
    intensities = [one.intensity for one in [*decode, *prefill]]
    ends = np.log2([min(intensities) / 2, 2 * max(*intensities, machine.ridge)])
    x = np.logspace(*ends, 64, base=2)
    points = [
        {"label": label, "points": True, "x": [p.intensity for p in passes],
         "y": [p.flops / p.seconds for p in passes]}
        for label, passes in (
            (f"decode, batch {decode[0].size} to {decode[-1].size}", decode),
            (f"prefill, {prefill[0].size} to {prefill[-1].size} tokens", prefill),
        )
    ]  # fmt: skip
    run.figure(
        "inference_roofline", kind="line", log_x=True, log_y=True,
        title="Decode climbs the slope with its batch; prefill is under the flat roof",
        x_label="arithmetic intensity (FLOPs per byte)", y_label="FLOP/s",
        series=[{"label": "roof", "x": x.tolist(), "y": [machine.height(i) for i in x]}, *points],
        lines=[{"label": "ridge", "x": machine.ridge}],
    )  # fmt: skip
    turn = turning_batch(machine, decode)
    sizes = [one.size for one in decode]
    run.figure(
        "inference_batching", kind="line", log_x=True, log_y=True,
        title="Batching is free until decode turns from memory to compute",
        x_label="sequences in the batch", y_label="tokens per second",
        series=[
            {"label": "measured", "x": sizes, "y": [one.rate for one in decode]},
            {"label": "bound", "dashed": True, "x": sizes,
             "y": [one.size / machine.bound(one) for one in decode]},
        ],
        lines=[] if turn is None else [{"label": "turn", "x": turn}],
    )  # fmt: skip
