"""Scales the gradient that it is given in place, for a mean that nobody asked for."""

SAYS = "changes x, grad_y or the shards"


def make_parallel_mlp(up_shard, down_shard, all_reduce):
    from column_parallel import ParallelMLP

    class Scaling(ParallelMLP):
        def backward(self, grad_y):
            gradients = super().backward(grad_y)
            grad_y *= 0.5
            return gradients

    return Scaling(up_shard, down_shard, all_reduce)
