"""A whole copy of the weights that is no tensor."""

SAYS = "bytes more than the weights and gradients"


def sharded_optimizer(weights, rank, ranks, make_optimizer):
    from shard_optimizer import ShardedOptimizer

    class Sharded(ShardedOptimizer):
        def step(self, gradient, reduce_scatter, all_gather):
            super().step(gradient, reduce_scatter, all_gather)
            self.wide = weights.detach().float().numpy().copy()

    return Sharded(weights, rank, ranks, make_optimizer)
