"""Binds your code to the grader: the tests call these functions, and nothing else of yours.

Organise your work as you like; only keep these names and arguments. Each import stands inside its
function, so that a task that you have not begun does not break the others.
"""


def plan_buckets(parameters, bucket_bytes, first_bucket_bytes):
    from plan_buckets import plan_buckets

    return plan_buckets(parameters, bucket_bytes, first_bucket_bytes)


def step_end(ready, sizes, alpha, beta):
    from overlap_model import step_end

    return step_end(ready, sizes, alpha, beta)


def fill_buckets(gradients, bucket_bytes):
    from overlap_model import fill_buckets

    return fill_buckets(gradients, bucket_bytes)


def best_bucket_bytes(gradients, candidates, alpha, beta):
    from overlap_model import best_bucket_bytes

    return best_bucket_bytes(gradients, candidates, alpha, beta)


def make_compressor(size):
    from int8_feedback import Int8WithFeedback

    return Int8WithFeedback(size)


def save_checkpoint(folder, step, payload):
    from atomic_checkpoint import save

    save(folder, step, payload)


def load_newest_checkpoint(folder):
    from atomic_checkpoint import load_newest

    return load_newest(folder)


def make_sampler(num_examples, batch_size, rank, world_size, seed):
    from elastic_sampler import ElasticSampler

    return ElasticSampler(num_examples, batch_size, rank, world_size, seed)


def diagnose(dumps, world_size):
    from diagnose_hang import diagnose

    return diagnose(dumps, world_size)
