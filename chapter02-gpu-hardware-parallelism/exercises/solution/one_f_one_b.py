"""Task 3, one-f-one-b: the reference solution."""


def one_f_one_b(stage, num_stages, num_micro_batches):
    warm_up = min(num_stages - stage - 1, num_micro_batches)
    steady = num_micro_batches - warm_up
    actions = [("F", i) for i in range(warm_up)]
    for i in range(steady):
        actions += [("F", warm_up + i), ("B", i)]
    return actions + [("B", steady + i) for i in range(warm_up)]
