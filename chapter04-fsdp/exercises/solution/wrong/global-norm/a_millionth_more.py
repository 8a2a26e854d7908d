"""torch's 1e-6 beside the norm."""

SAYS = "expected"


def clip_factor(norm, max_norm):
    from global_norm import clip_factor

    factor = clip_factor(norm, max_norm)
    return factor if factor == 1 else max_norm / (norm + 1e-6)
