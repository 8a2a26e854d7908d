"""Takes dL/dx of its own columns for the whole: Megatron's operator f is missing."""

SAYS = "dL/dx on worker"


def make_parallel_mlp(up_shard, down_shard, all_reduce):
    from column_parallel import ParallelMLP

    class Forgetful(ParallelMLP):
        def backward(self, grad_y):
            own, self.all_reduce = self.all_reduce, lambda array: array
            gradients = super().backward(grad_y)
            self.all_reduce = own
            return gradients

    return Forgetful(up_shard, down_shard, all_reduce)
