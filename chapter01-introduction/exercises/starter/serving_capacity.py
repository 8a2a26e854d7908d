"""Task 5, serving-capacity: how many requests fit on a GPU, and how long they wait."""

import numpy as np


def kv_cache_bytes(
    layers: int, kv_heads: int, head_dim: int, bytes_per_element: int, tokens: int
) -> int:
    """The bytes of the KV cache of one request with `tokens` tokens."""
    raise NotImplementedError("serving_capacity.kv_cache_bytes is yours to write")


def requests_that_fit(
    gpu_bytes: int, usable_share: float, weight_bytes: int, request_bytes: int
) -> int:
    """How many whole requests the GPU holds at once beside the weights; 0 where none fits.

    usable_share: the part of gpu_bytes that weights and caches may fill together.
    """
    raise NotImplementedError("serving_capacity.requests_that_fit is yours to write")


def poisson_arrivals(rate: float, count: int, seed: int) -> np.ndarray:
    """The arrival times of a Poisson process: [count], float64, increasing, seconds.

    rate: requests per second. The gaps between arrivals are independent of each other.
    """
    raise NotImplementedError("serving_capacity.poisson_arrivals is yours to write")


def latencies(arrivals: np.ndarray, service_seconds: np.ndarray, servers: int) -> np.ndarray:
    """The time from each request's arrival to its end: [count], seconds.

    arrivals: [count], increasing. service_seconds: [count], what each takes once it has begun.
    Requests begin in the order of their arrival, each on the first of the servers to be free.
    """
    raise NotImplementedError("serving_capacity.latencies is yours to write")
