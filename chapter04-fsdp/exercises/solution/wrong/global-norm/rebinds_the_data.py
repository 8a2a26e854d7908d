"""Gives the tensors new memory: whoever holds the old one, a flat buffer, sees no clipping."""

SAYS = "in other memory than what was given"


def clip(sharded, replicated, max_norm, all_reduce, replicas, in_place):
    from global_norm import clip

    norm, *parts = clip(sharded, replicated, max_norm, all_reduce, replicas, False)
    if not in_place:
        return norm, *parts
    for old, new in zip([*sharded, *replicated], [*parts[0], *parts[1]], strict=True):
        if old is not None:
            old.data = new
    return norm, list(sharded), list(replicated)
