"""Sums what all ranks have whole, once for each of them."""

SAYS = "2 is on all ranks, and one"


def global_norm(sharded, replicated, all_reduce, replicas):
    from global_norm import global_norm

    return global_norm([*sharded, *replicated], [], all_reduce, replicas)
