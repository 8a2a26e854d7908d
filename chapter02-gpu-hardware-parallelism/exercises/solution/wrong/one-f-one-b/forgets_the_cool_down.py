"""Ends with the last forward pass: the backward passes of the warm-up are never done."""

SAYS = "the Bs are"


def one_f_one_b(stage, num_stages, num_micro_batches):
    warm_up = min(num_stages - stage - 1, num_micro_batches)
    actions = [("F", i) for i in range(warm_up)]
    for i in range(num_micro_batches - warm_up):
        actions += [("F", warm_up + i), ("B", i)]
    return actions
