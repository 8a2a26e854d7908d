"""Cuts its part out of its own gradient: the ranks never hear of each other's."""

SAYS = "copy of the weights is"


def sharded_optimizer(weights, rank, ranks, make_optimizer):
    from shard_optimizer import ShardedOptimizer

    class Sharded(ShardedOptimizer):
        def step(self, gradient, reduce_scatter, all_gather):
            def own(whole):
                return whole[rank * self.size : (rank + 1) * self.size] * self.ranks

            super().step(gradient, own, all_gather)

    return Sharded(weights, rank, ranks, make_optimizer)
