"""Weights that do not fit leave less than no room."""

SAYS = "150,323,855,360 B of weights"


def requests_that_fit(gpu_bytes, usable_share, weight_bytes, request_bytes):
    return int((gpu_bytes * usable_share - weight_bytes) // request_bytes)
