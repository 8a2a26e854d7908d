"""Expects a gradient of every parameter."""

SAYS = "NoneType"


def global_norm(sharded, replicated, all_reduce, replicas):
    from global_norm import global_norm

    for one in [*sharded, *replicated]:
        one.dtype  # noqa: B018
    return global_norm(sharded, replicated, all_reduce, replicas)
