"""Rounds parts down and gives the last rank what is left."""

SAYS = "the optimizer's tensor is"


def sharded_optimizer(weights, rank, ranks, make_optimizer):
    from shard_optimizer import ShardedOptimizer

    class Uneven(ShardedOptimizer):
        def __init__(self):
            super().__init__(weights, rank, ranks, lambda parts: None)
            size = len(weights) // ranks
            end = len(weights) if rank == ranks - 1 else (rank + 1) * size
            self.part = weights.detach()[rank * size : end].float().clone()
            self.optimizer = make_optimizer([self.part])

    return Uneven()
