"""Forgets that in hybrid sharding several ranks have the same shard."""

SAYS = "two copies of the model are one model"


def global_norm(sharded, replicated, all_reduce, replicas):
    from global_norm import global_norm

    return global_norm(sharded, replicated, all_reduce, 1)
