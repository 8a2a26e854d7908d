"""Keeps the part in the weights' own type."""

SAYS = "torch.bfloat16, expected"


def sharded_optimizer(weights, rank, ranks, make_optimizer):
    from shard_optimizer import ShardedOptimizer

    def make(parts):
        return make_optimizer([part.to(weights.dtype) for part in parts])

    return ShardedOptimizer(weights, rank, ranks, make)
