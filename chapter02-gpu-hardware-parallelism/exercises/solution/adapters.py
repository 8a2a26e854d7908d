"""Binds your code to the grader: the tests call these functions, and nothing else of yours.

Organise your work as you like; only keep these names and arguments. Each import stands inside its
function, so that a task that you have not begun does not break the others.
"""


def ring_all_reduce(buffer, rank, world_size, send, receive):
    from ring_all_reduce import ring_all_reduce

    return ring_all_reduce(buffer, rank, world_size, send, receive)


def split_weights(up, down, rank, world_size):
    from column_parallel import split_weights

    return split_weights(up, down, rank, world_size)


def make_parallel_mlp(up_shard, down_shard, all_reduce):
    from column_parallel import ParallelMLP

    return ParallelMLP(up_shard, down_shard, all_reduce)


def one_f_one_b(stage, num_stages, num_micro_batches):
    from one_f_one_b import one_f_one_b

    return one_f_one_b(stage, num_stages, num_micro_batches)


def make_online_attention(queries):
    from online_softmax import OnlineAttention

    return OnlineAttention(queries)


def route(scores, capacity):
    from capacity_routing import route

    return route(scores, capacity)
