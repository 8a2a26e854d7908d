"""A rank without gradients does not call: all others wait for it."""

SAYS = "was called 0 times"


def global_norm(sharded, replicated, all_reduce, replicas):
    import math

    from global_norm import global_norm, squares

    if all(one is None for one in sharded):
        return math.sqrt(squares(replicated))
    return global_norm(sharded, replicated, all_reduce, replicas)
