"""Task 2, column-parallel: the reference solution."""

import numpy as np


def split_weights(up, down, rank, world_size):
    inner = up.shape[1]
    if inner % world_size:
        raise ValueError(f"{world_size} workers do not divide {inner} columns")
    return np.split(up, world_size, axis=1)[rank], np.split(down, world_size, axis=0)[rank]


class ParallelMLP:
    def __init__(self, up_shard, down_shard, all_reduce):
        self.up, self.down, self.all_reduce = up_shard, down_shard, all_reduce

    def forward(self, x):
        self.x = x
        self.inner = np.maximum(x @ self.up, 0)  # [tokens, inner / K]: no other worker is needed
        return self.all_reduce(self.inner @ self.down)  # each worker has a part of every sum

    def backward(self, grad_y):
        grad_down = self.inner.T @ grad_y
        grad_inner = (grad_y @ self.down.T) * (self.inner > 0)
        grad_up = self.x.T @ grad_inner
        return self.all_reduce(grad_inner @ self.up.T), grad_up, grad_down
