"""Sums the ranks' norms."""

SAYS = "expected a norm of 5.0"


def global_norm(sharded, replicated, all_reduce, replicas):
    import math

    from global_norm import squares

    everywhere = all_reduce(math.sqrt(squares(sharded))) / replicas
    return everywhere + math.sqrt(squares(replicated))
