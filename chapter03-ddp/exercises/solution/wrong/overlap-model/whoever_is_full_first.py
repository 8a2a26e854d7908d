"""Sends the bucket that is full first, which the ranks would not agree on."""

SAYS = "every rank sends bucket 0 before it"


def step_end(ready, sizes, alpha, beta):
    from overlap_model import step_end

    pairs = sorted(zip(ready, sizes, strict=True))
    return step_end([r for r, _ in pairs], [s for _, s in pairs], alpha, beta)
