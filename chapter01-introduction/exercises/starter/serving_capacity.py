"""Task 5, serving-capacity: how many requests fit on a GPU, and how long they wait."""

import numpy as np


def kv_cache_bytes(
    layers: int, kv_heads: int, head_dim: int, bytes_per_element: int, tokens: int
) -> int:
    """The bytes of the KV cache of one request with `tokens` tokens: exact, however many."""
    raise NotImplementedError("serving_capacity.kv_cache_bytes is yours to write")


def requests_that_fit(
    gpu_bytes: int, usable_share: float, weight_bytes: int, request_bytes: int
) -> int:
    """How many whole requests the GPU holds at once beside the weights; 0 where none fits.

    usable_share: the part of gpu_bytes that weights and caches may fill together, to the last byte.
    request_bytes: at least 1.
    """
    raise NotImplementedError("serving_capacity.requests_that_fit is yours to write")


def poisson_arrivals(rate: float, count: int, seed: int) -> np.ndarray:
    """The arrival times of a Poisson process: [count], float64, increasing, seconds.

    rate: requests per second. The gaps between arrivals are independent of each other; the first
    request comes after such a gap too. The same seed gives the same times, another one others.
    count may be 0.
    """
    raise NotImplementedError("serving_capacity.poisson_arrivals is yours to write")


def latencies(arrivals: np.ndarray, service_seconds: np.ndarray, servers: int) -> np.ndarray:
    """The time from each request's arrival to its end: [count], float64, seconds.

    arrivals: [count], not negative, never decreasing; some may be equal. service_seconds: [count],
    what each takes once it has begun, 0 or more. Both may be float64, float32 or integers, may be
    empty, and are not changed. servers: at least 1, all free at the start.
    Requests begin in the order of their positions, each on the first of the servers to be free; a
    server that ends one request at the moment when another arrives is free for it.
    """
    raise NotImplementedError("serving_capacity.latencies is yours to write")
