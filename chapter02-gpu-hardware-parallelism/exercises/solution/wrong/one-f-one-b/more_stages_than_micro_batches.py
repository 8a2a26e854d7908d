"""Warms up with micro-batches that do not exist."""

SAYS = "expected 0 to"


def one_f_one_b(stage, num_stages, num_micro_batches):
    warm_up = num_stages - stage - 1
    actions = [("F", i) for i in range(warm_up)]
    for i in range(max(0, num_micro_batches - warm_up)):
        actions += [("F", warm_up + i), ("B", i)]
    left = range(max(0, num_micro_batches - warm_up), num_micro_batches)
    return actions + [("B", i) for i in left]
