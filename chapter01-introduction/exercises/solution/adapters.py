"""Binds your code to the grader: the tests call these functions, and nothing else of yours.

Organise your work as you like; only keep these names and arguments. Each import stands inside its
function, so that a task that you have not begun does not break the others.
"""


def combine_gradients(gradients, counts):
    from uneven_shards import combine_gradients

    return combine_gradients(gradients, counts)


def gradient_scale(count, total, world_size):
    from uneven_shards import gradient_scale

    return gradient_scale(count, total, world_size)


def saved_bytes(forward, parameters):
    from activation_memory import saved_bytes

    return saved_bytes(forward, parameters)


def block_activation_bytes(**sizes):
    from activation_memory import block_activation_bytes

    return block_activation_bytes(**sizes)


def make_sampler(num_examples, global_batch, rank, world_size, seed):
    from resumable_sampler import ResumableSampler

    return ResumableSampler(num_examples, global_batch, rank, world_size, seed)


def time_shares(trace):
    from read_profile import time_shares

    return time_shares(trace)


def bottleneck(trace):
    from read_profile import bottleneck

    return bottleneck(trace)


def kv_cache_bytes(layers, kv_heads, head_dim, bytes_per_element, tokens):
    from serving_capacity import kv_cache_bytes

    return kv_cache_bytes(layers, kv_heads, head_dim, bytes_per_element, tokens)


def requests_that_fit(gpu_bytes, usable_share, weight_bytes, request_bytes):
    from serving_capacity import requests_that_fit

    return requests_that_fit(gpu_bytes, usable_share, weight_bytes, request_bytes)


def poisson_arrivals(rate, count, seed):
    from serving_capacity import poisson_arrivals

    return poisson_arrivals(rate, count, seed)


def latencies(arrivals, service_seconds, servers):
    from serving_capacity import latencies

    return latencies(arrivals, service_seconds, servers)
