"""Takes the derivative of relu at 0 for 1: `>=` for `>`."""

SAYS = "dL/dx on worker"


def make_parallel_mlp(up_shard, down_shard, all_reduce):
    from column_parallel import ParallelMLP

    class AtZero(ParallelMLP):
        def backward(self, grad_y):
            grad_inner = (grad_y @ self.down.T) * (self.x @ self.up >= 0)
            grad_x = self.all_reduce(grad_inner @ self.up.T)
            return grad_x, self.x.T @ grad_inner, self.inner.T @ grad_y

    return AtZero(up_shard, down_shard, all_reduce)
