"""Gives the last stages the long warm-up."""

SAYS = "every stage waits"


def one_f_one_b(stage, num_stages, num_micro_batches):
    from one_f_one_b import one_f_one_b

    return one_f_one_b(num_stages - 1 - stage, num_stages, num_micro_batches)
