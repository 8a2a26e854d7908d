"""A norm of nan makes every gradient nan."""

SAYS = "no factor mends it"


def clip_factor(norm, max_norm):
    from global_norm import clip_factor

    return norm if norm != norm else clip_factor(norm, max_norm)
