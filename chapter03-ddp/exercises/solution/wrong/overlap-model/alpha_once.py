"""Pays the latency once, as if all buckets were one message."""

SAYS = "each all-reduce has its own alpha"


def step_end(ready, sizes, alpha, beta):
    from overlap_model import step_end

    return step_end(ready, sizes, 0.0, beta) + (alpha if ready else 0.0)
