"""Task 2, overlap-model: the reference solution."""


def step_end(ready, sizes, alpha, beta):
    link_is_free = 0.0
    for full, size in zip(ready, sizes, strict=True):
        link_is_free = max(full, link_is_free) + alpha + beta * size
    return link_is_free


def fill_buckets(gradients, bucket_bytes):
    ready, sizes = [], []
    for when, size in gradients:
        if sizes and sizes[-1] + size <= bucket_bytes:
            ready[-1] = when
            sizes[-1] += size
        else:
            ready.append(when)
            sizes.append(size)
    return ready, sizes


def best_bucket_bytes(gradients, candidates, alpha, beta):
    ends = {
        candidate: step_end(*fill_buckets(gradients, candidate), alpha, beta)
        for candidate in candidates
    }
    soonest = min(ends.values())
    return max(candidate for candidate, end in ends.items() if end - soonest < 1e-12)
