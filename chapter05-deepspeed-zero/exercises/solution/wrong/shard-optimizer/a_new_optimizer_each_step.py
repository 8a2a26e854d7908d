"""Forgets the moments after each step."""

SAYS = "copy of the weights is"


def sharded_optimizer(weights, rank, ranks, make_optimizer):
    from shard_optimizer import ShardedOptimizer

    class Sharded(ShardedOptimizer):
        def step(self, gradient, reduce_scatter, all_gather):
            self.optimizer = make_optimizer([self.part])
            super().step(gradient, reduce_scatter, all_gather)

    return Sharded(weights, rank, ranks, make_optimizer)
