"""Squares in the gradients' own type: over 65,504 there is none in float16."""

SAYS = "squares are over 65,504"


def global_norm(sharded, replicated, all_reduce, replicas):
    import math

    def squares(gradients):
        there = [one for one in gradients if one is not None]
        return sum((one.square().float().sum().item() for one in there), 0.0)

    return math.sqrt(all_reduce(squares(sharded)) / replicas + squares(replicated))
