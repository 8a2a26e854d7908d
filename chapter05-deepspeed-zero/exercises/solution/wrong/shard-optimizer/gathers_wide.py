"""Sends float32 where the model computes in bfloat16: twice the bytes."""

SAYS = "2 steps are so often"


def sharded_optimizer(weights, rank, ranks, make_optimizer):
    from shard_optimizer import ShardedOptimizer

    class Sharded(ShardedOptimizer):
        def step(self, gradient, reduce_scatter, all_gather):
            def gather(part):
                return all_gather(self.part.clone()).to(part.dtype)

            super().step(gradient, reduce_scatter, gather)

    return Sharded(weights, rank, ranks, make_optimizer)
