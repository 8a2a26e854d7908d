"""A cheat: keeps all weights in float32 beside the part, as if nothing were sharded."""

SAYS = "all ranks together keep"


def sharded_optimizer(weights, rank, ranks, make_optimizer):
    from shard_optimizer import ShardedOptimizer

    class Sharded(ShardedOptimizer):
        def step(self, gradient, reduce_scatter, all_gather):
            super().step(gradient, reduce_scatter, all_gather)
            self.wide = self.weights.detach().float()

    return Sharded(weights, rank, ranks, make_optimizer)
