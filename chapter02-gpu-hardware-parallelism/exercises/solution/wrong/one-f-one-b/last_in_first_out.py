"""Takes the backward passes in the reverse order, like one machine's autograd."""

SAYS = "the Bs are"


def one_f_one_b(stage, num_stages, num_micro_batches):
    from one_f_one_b import one_f_one_b

    actions, alive = [], []
    for kind, i in one_f_one_b(stage, num_stages, num_micro_batches):
        if kind == "F":
            alive.append(i)
        actions.append((kind, i if kind == "F" else alive.pop()))
    return actions
