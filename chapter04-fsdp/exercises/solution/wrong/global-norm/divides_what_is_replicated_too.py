"""Divides by the replicas at the very end, with what was added once."""

SAYS = "three copies, and one whole"


def global_norm(sharded, replicated, all_reduce, replicas):
    import math

    from global_norm import squares

    return math.sqrt((all_reduce(squares(sharded)) + squares(replicated)) / replicas)
