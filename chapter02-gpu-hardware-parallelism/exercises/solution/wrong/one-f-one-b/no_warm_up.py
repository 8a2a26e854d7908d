"""Alternates from the start: one micro-batch at a time is in the pipeline, which is then none."""

SAYS = "units of time"


def one_f_one_b(stage, num_stages, num_micro_batches):
    return [(kind, i) for i in range(num_micro_batches) for kind in ("F", "B")]
