"""All forwards, then all backwards: GPipe, which is as fast and holds every activation."""

SAYS = "are enough"


def one_f_one_b(stage, num_stages, num_micro_batches):
    order = range(num_micro_batches)
    return [("F", i) for i in order] + [("B", i) for i in order]
