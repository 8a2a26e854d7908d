"""Wants room beyond the last request: `>` for `>=`."""

SAYS = "expected 56 requests, got 55"


def requests_that_fit(gpu_bytes, usable_share, weight_bytes, request_bytes):
    room, requests = round(gpu_bytes * usable_share, 3) - weight_bytes, 0
    while room - requests * request_bytes > request_bytes:
        requests += 1
    return requests
