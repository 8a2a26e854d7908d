"""Each rank clips by the norm of what it has: as many factors as ranks."""

SAYS = "times; each rank calls it once"


def global_norm(sharded, replicated, all_reduce, replicas):
    from global_norm import global_norm

    return global_norm(sharded, replicated, lambda value: value, 1)
