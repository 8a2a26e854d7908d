"""Reduces in the gradients' own type."""

SAYS = "it called"


def sharded_optimizer(weights, rank, ranks, make_optimizer):
    from shard_optimizer import ShardedOptimizer

    class Sharded(ShardedOptimizer):
        def step(self, gradient, reduce_scatter, all_gather):
            def narrow(whole):
                return reduce_scatter(whole.to(gradient.dtype)).float()

            super().step(gradient, narrow, all_gather)

    return Sharded(weights, rank, ranks, make_optimizer)
