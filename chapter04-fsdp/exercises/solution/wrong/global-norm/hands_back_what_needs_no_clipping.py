"""Gives the given tensors back where the factor is 1."""

SAYS = "is in the memory of what was given"


def clip(sharded, replicated, max_norm, all_reduce, replicas, in_place):
    from global_norm import clip, clip_factor

    norm, *parts = clip(sharded, replicated, max_norm, all_reduce, replicas, in_place)
    if clip_factor(norm, max_norm) == 1:
        parts = list(sharded), list(replicated)
    return norm, *parts
