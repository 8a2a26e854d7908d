"""Alternates in pairs, two forward and two backward passes."""

SAYS = "units of time"


def one_f_one_b(stage, num_stages, num_micro_batches):
    warm_up = min(num_stages - stage - 1, num_micro_batches)
    actions, done = [("F", i) for i in range(warm_up)], 0
    for i in range(warm_up, num_micro_batches, 2):
        pair = range(i, min(i + 2, num_micro_batches))
        actions += [("F", j) for j in pair] + [("B", done + j - i) for j in pair]
        done += len(pair)
    return actions + [("B", j) for j in range(done, num_micro_batches)]
