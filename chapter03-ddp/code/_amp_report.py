"""What `amp_ddp.py` says of the losses and the speed of each precision."""

from collections.abc import Mapping, Sequence

import numpy as np

from distlab.run import Run
from distlab.runtime import Runtime

LAST = 5  # steps, over which a loss is averaged
WARMUP = 2
LOSS_TOLERANCE = 0.02  # relative: 16 bits round otherwise, and training amplifies it


def report_losses(run: Run, losses: Mapping[str, Sequence[float]]) -> None:
    run.figure(
        "losses", kind="line", title="The same training in each precision", x_label="step",
        y_label="loss (nats)",
        series=[
            {"label": name, "x": list(range(len(own))), "y": list(own)}
            for name, own in losses.items()
        ],
    )  # fmt: skip
    final = {name: float(np.mean(own[-LAST:])) for name, own in losses.items()}
    run.extra(losses=losses)
    for name in ("bfloat16", "float16"):
        run.check_close(
            f"{name} ends with float32's loss", final[name], final["float32"], LOSS_TOLERANCE, True
        )


def report_speed(run: Run, job: Runtime, seconds: Mapping[str, Sequence[float]]) -> None:
    medians = {name: float(np.median(own[WARMUP:])) for name, own in seconds.items()}
    plain = medians["float32"]
    run.table(
        "speed",
        ["precision", "step ms", "times as fast as float32"],
        [[name, 1e3 * median, plain / median] for name, median in medians.items()],
        caption=f"A step of one rank of {job.world_size}, medians, timed in turns",
    )
    best = min(("bfloat16", "float16"), key=medians.__getitem__)
    faster = plain / medians[best]
    run.print(
        f"verdict: on this {job.device.type} 16 bits are "
        + (f"{faster:.2f} times as fast" if faster > 1 else f"{1 / faster:.2f} times as slow")
    )
