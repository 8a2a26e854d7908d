"""Changes the gradients whatever it is told."""

SAYS = "not in place: "


def clip(sharded, replicated, max_norm, all_reduce, replicas, in_place):
    from global_norm import clip

    return clip(sharded, replicated, max_norm, all_reduce, replicas, True)
