"""Keeps the first input for the backward pass, not the last."""

SAYS = "dL/dx on worker"


def make_parallel_mlp(up_shard, down_shard, all_reduce):
    from column_parallel import ParallelMLP

    class First(ParallelMLP):
        kept = None

        def forward(self, x):
            y = super().forward(x)
            self.kept = self.kept or (self.x, self.inner)
            return y

        def backward(self, grad_y):
            self.x, self.inner = self.kept
            return super().backward(grad_y)

    return First(up_shard, down_shard, all_reduce)
