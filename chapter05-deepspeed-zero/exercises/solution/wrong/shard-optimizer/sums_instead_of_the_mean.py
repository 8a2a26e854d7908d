"""Leaves out the division by the ranks."""

SAYS = "copy of the weights is"


def sharded_optimizer(weights, rank, ranks, make_optimizer):
    from shard_optimizer import ShardedOptimizer

    class Sharded(ShardedOptimizer):
        def step(self, gradient, reduce_scatter, all_gather):
            super().step(gradient, lambda whole: reduce_scatter(whole) * self.ranks, all_gather)

    return Sharded(weights, rank, ranks, make_optimizer)
