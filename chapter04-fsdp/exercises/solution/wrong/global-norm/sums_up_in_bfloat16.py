"""Adds the parameters' squares in their own type: a sum of ones stays at 256 in bfloat16."""

SAYS = "in torch.bfloat16"


def global_norm(sharded, replicated, all_reduce, replicas):
    import math

    from global_norm import wide

    def squares(gradients):
        total = 0.0
        for one in gradients:
            if one is not None:
                total = (wide(one).square().sum() + total).to(one.dtype).float()
        return float(total)

    return math.sqrt(all_reduce(squares(sharded)) / replicas + squares(replicated))
