"""Always scales to max_norm, small gradients too."""

SAYS = "never multiplied by more than 1"


def clip_factor(norm, max_norm):
    from global_norm import clip_factor

    clip_factor(norm, max_norm)
    return max_norm / norm if 0 < norm < float("inf") else 1.0
