"""Scales the shards only."""

SAYS = "rounded once"


def clip(sharded, replicated, max_norm, all_reduce, replicas, in_place):
    from global_norm import clip

    norm, clipped, _ = clip(sharded, replicated, max_norm, all_reduce, replicas, False)
    if not in_place:
        return norm, clipped, [None if one is None else one.clone() for one in replicated]
    for one, new in zip(sharded, clipped, strict=True):
        if one is not None:
            one.copy_(new)
    return norm, list(sharded), list(replicated)
