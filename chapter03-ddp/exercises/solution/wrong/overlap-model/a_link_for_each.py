"""Lets all buckets travel at once, each at the link's full speed."""

SAYS = "each all-reduce has its own alpha"


def step_end(ready, sizes, alpha, beta):
    return max((r + alpha + beta * s for r, s in zip(ready, sizes, strict=True)), default=0.0)
