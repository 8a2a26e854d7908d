"""No stage at all: an optimizer of everything on every rank. It even trains well."""

SAYS = "the optimizer's tensor is"


def sharded_optimizer(weights, rank, ranks, make_optimizer):
    import torch
    from shard_optimizer import ShardedOptimizer

    class Replicated(ShardedOptimizer):
        def __init__(self):
            super().__init__(weights, rank, ranks, lambda parts: None)
            self.wide = self.padded(weights.detach())
            self.optimizer = make_optimizer([self.wide])

        @torch.no_grad()
        def step(self, gradient, reduce_scatter, all_gather):
            own = reduce_scatter(self.padded(gradient)) / ranks
            self.wide.grad = all_gather(own)
            self.optimizer.step()
            self.wide.grad = None
            weights.copy_(self.wide[: len(weights)])

    return Replicated()
