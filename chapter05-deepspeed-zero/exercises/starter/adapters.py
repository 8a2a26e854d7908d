"""Binds your code to the grader: the tests call these functions, and nothing else of yours.

Organise your work as you like; only keep these names and arguments. Each import stands inside its
function, so that a task that you have not begun does not break the others.
"""


def sharded_optimizer(weights, rank, ranks, make_optimizer):
    from shard_optimizer import ShardedOptimizer

    return ShardedOptimizer(weights, rank, ranks, make_optimizer)


def fill_buckets(sizes, arrival, limit):
    from reduce_buckets import fill_buckets

    return fill_buckets(sizes, arrival, limit)


def owner_slices(sizes, bucket, ranks):
    from reduce_buckets import owner_slices

    return owner_slices(sizes, bucket, ranks)


def landings(sizes, bucket, ranks, rank):
    from reduce_buckets import landings

    return landings(sizes, bucket, ranks, rank)


def stage_memory(sizes, settings):
    from stage_memory import stage_memory

    return stage_memory(sizes, settings)


def largest_model(settings, parameters, device, host, file):
    from stage_memory import largest_model

    return largest_model(settings, parameters, device, host, file)


def copies_to(target, sizes, sources, targets):
    from migration_map import copies_to

    return copies_to(target, sizes, sources, targets)


def migrate(partitions, sizes, targets):
    from migration_map import migrate

    return migrate(partitions, sizes, targets)


def capacity(tokens, experts, factor):
    from balance_router import capacity

    return capacity(tokens, experts, factor)


def route(logits, factor):
    from balance_router import route

    return route(logits, factor)


def balancing_loss(logits):
    from balance_router import balancing_loss

    return balancing_loss(logits)
