"""Rebinds the weights' data: what else looks at their memory keeps the old ones."""

SAYS = "weights are in other memory than before"


def sharded_optimizer(weights, rank, ranks, make_optimizer):
    from shard_optimizer import ShardedOptimizer

    class Sharded(ShardedOptimizer):
        def step(self, gradient, reduce_scatter, all_gather):
            given, self.weights = self.weights, self.weights.detach().clone()
            super().step(gradient, reduce_scatter, all_gather)
            given.data, self.weights = self.weights, given

    return Sharded(weights, rank, ranks, make_optimizer)
