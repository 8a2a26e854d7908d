"""Has a constant for the deepest pipeline of the visible cases."""

SAYS = "units of time"


def one_f_one_b(stage, num_stages, num_micro_batches):
    from one_f_one_b import one_f_one_b

    return one_f_one_b(stage, min(num_stages, max(stage + 1, 8)), num_micro_batches)
