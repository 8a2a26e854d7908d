"""Sends everything after the backward pass."""

SAYS = "reduced beside the backward pass"


def step_end(ready, sizes, alpha, beta):
    return max(ready, default=0.0) + sum(alpha + beta * size for size in sizes)
