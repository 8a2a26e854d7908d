"""Begins each step at the weights, as bfloat16 has rounded them."""

SAYS = "'s part is"


def sharded_optimizer(weights, rank, ranks, make_optimizer):
    from shard_optimizer import ShardedOptimizer

    class Sharded(ShardedOptimizer):
        def step(self, gradient, reduce_scatter, all_gather):
            whole = self.padded(self.weights.detach())
            self.part.copy_(whole[rank * self.size : (rank + 1) * self.size])
            super().step(gradient, reduce_scatter, all_gather)

    return Sharded(weights, rank, ranks, make_optimizer)
