"""Keeps the link busy from the first bucket on, although a later one may not be full yet."""

SAYS = "the step ends at"


def step_end(ready, sizes, alpha, beta):
    return (ready[0] if ready else 0.0) + sum(alpha + beta * size for size in sizes)
