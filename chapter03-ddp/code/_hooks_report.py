"""What `comm_hooks.py` says of the hooks: bytes, times on each link, and losses."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from _hooks_feedback import Feedback, report_feedback
from _hooks_payload import most_on_the_wire
from _hooks_training import Measured

from distlab import predict
from distlab.cluster.links import burst_bytes, parse_rate
from distlab.run import Run

LAST = 5  # steps, over which a loss is averaged
GOOD_LOSS = 0.01  # as much worse than without a hook, relative
BAD_LOSS = 0.05


def report_nodes(run: Run, args: Namespace, record: Mapping[str, Any]) -> None:
    """What a job on the nodes has measured, as its record has it, and its steps on each link."""
    measured = [Measured(**one) for one in record["measured"]]
    report(run, args, measured, Feedback(**record["feedback"]))
    report_links(run, args, measured)
    held = [check["ok"] for check in record["checks"]]
    run.check_equal("every check of the nodes holds", held, [True] * len(held))


def report(run: Run, args: Namespace, measured: Sequence[Measured], feedback: Feedback) -> None:
    """Bytes, cost and loss of each hook, and what feedback is worth."""
    report_hooks(run, args, measured)
    report_feedback(run, feedback)


def report_hooks(run: Run, args: Namespace, measured: Sequence[Measured]) -> None:
    """Bytes, cost on this machine and loss of each hook; its time on each link, where measured."""
    plain = measured[0]
    run.table(
        "hooks",
        ["hook", "kB*", "kB on the wire", "% more", "step ms", "CPU ms", "loss", "worse by %"],
        [
            [
                one.name, one.payload / 1e3, kilo(one.wire), added(one), 1e3 * one.seconds,
                1e3 * one.cpu_seconds, final(one), 100 * worse(one, plain),
            ]
            for one in measured
        ],
        caption="What a rank sends in a step (* predicted, without headers), how long the step and "
        "its computing take without a limit on the link, and the loss: mean of the last "
        f"{min(LAST, args.steps)} of {args.steps} steps",
    )  # fmt: skip
    run.figure(
        "losses", kind="line", title="What the hooks spoil: the same batches, loss by loss",
        x_label="step", y_label="loss above that without a hook (nats)",
        series=[
            {
                "label": one.name,
                "x": list(range(len(one.losses))),
                "y": (np.array(one.losses) - plain.losses).tolist(),
            }
            for one in measured[1:]
        ],
    )  # fmt: skip
    run.check_below(
        "the worst hook's loss, relative to that without",
        float(np.max([worse(one, plain) for one in measured])),
        BAD_LOSS,
    )
    sent = [(one.payload, one.wire) for one in measured if one.wire is not None and one.payload]
    if sent:
        more = [100 * (wire / payload - 1) for payload, wire in sent]
        run.check_true(
            "on the wire is each hook's payload, and no more than TCP adds to it",
            all(payload <= wire <= most_on_the_wire(payload) for payload, wire in sent),
            f"{min(more):.2g} to {max(more):.2g} % more",
        )


def report_links(run: Run, args: Namespace, measured: Sequence[Measured]) -> None:
    """A step on each link: what it takes without a limit, and its bytes at the link's rate."""
    plain = measured[0]
    rows, least = [], []
    errors: dict[float, list[float]] = {}
    for rate in args.rates:
        bits_per_s = parse_rate(rate)
        errors[bits_per_s] = []
        for one in measured:
            seconds = one.on_link[rate]
            predicted = one.seconds + one.payload / predict.tcp_goodput(bits_per_s)
            error = (predicted - seconds) / seconds
            errors[bits_per_s].append(abs(error))
            least.append(seconds - (one.payload - burst_bytes(bits_per_s)) / (bits_per_s / 8))
            times = plain.on_link[rate] / seconds
            rows.append([rate, one.name, 1e3 * predicted, 1e3 * seconds, 100 * error, times])
        run.print(verdict(rate, measured))
    run.table(
        "links",
        ["link", "hook", "step* ms", "step ms", "error %", "times as fast"],
        rows,
        caption="A step on each link, * predicted: as without a limit, and its bytes at the rate",
    )
    run.figure(
        "links", kind="bar", title="A training step by hook and link", x_label="",
        y_label="step (ms)",
        series=[
            {
                "label": rate,
                "x": [one.name for one in measured],
                "y": [1e3 * one.on_link[rate] for one in measured],
            }
            for rate in args.rates
        ],
    )  # fmt: skip
    run.check_true(
        "no step is faster than its bytes can pass", min(least) > 0, f"{1e3 * min(least):.3g} ms"
    )
    typical = float(np.median(errors[min(errors)]))
    run.check_below("on the slowest link a predicted step errs by", typical, args.tolerance)


def verdict(rate: str, measured: Sequence[Measured]) -> str:
    """The fastest hook on a link among those that train as well as none."""
    plain = measured[0]
    good = [one for one in measured if worse(one, plain) <= GOOD_LOSS]
    best = min(good, key=lambda one: one.on_link[rate])
    times = plain.on_link[rate] / best.on_link[rate]
    return (
        f"verdict: on {rate} {best.name} is the fastest of those whose loss is at most "
        f"{100 * GOOD_LOSS:g} % worse than without a hook, {times:.2f} times as fast"
    )


def worse(one: Measured, plain: Measured) -> float:
    return final(one) / final(plain) - 1


def final(one: Measured) -> float:
    return float(np.mean(one.losses[-LAST:]))


def added(one: Measured) -> float | None:
    """What the wire carries more than the payload, in %."""
    return None if not one.wire or not one.payload else 100 * (one.wire / one.payload - 1)


def kilo(value: float | None) -> float | None:
    return None if value is None else value / 1e3
