"""Communicates an array twice as wide as y, and throws half of the sum away."""

import numpy as np

SAYS = "as large as x, each way"


def make_parallel_mlp(up_shard, down_shard, all_reduce):
    from column_parallel import ParallelMLP

    def wide_all_reduce(array):
        return all_reduce(np.concatenate([array, array], axis=1))[:, : array.shape[1]]

    return ParallelMLP(up_shard, down_shard, wide_all_reduce)
