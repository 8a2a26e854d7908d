"""Frees the gradient at the next step only, when it is replaced."""

SAYS = "a gradient is kept"


def sharded_optimizer(weights, rank, ranks, make_optimizer):
    from shard_optimizer import ShardedOptimizer

    class Sharded(ShardedOptimizer):
        def step(self, gradient, reduce_scatter, all_gather):
            super().step(gradient, reduce_scatter, all_gather)
            self.part.grad = self.part.clone()

    return Sharded(weights, rank, ranks, make_optimizer)
