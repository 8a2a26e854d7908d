"""requires_grad is switched off for good."""

SAYS = "requires_grad is changed"


def sharded_optimizer(weights, rank, ranks, make_optimizer):
    from shard_optimizer import ShardedOptimizer

    return ShardedOptimizer(weights.requires_grad_(False), rank, ranks, make_optimizer)
