"""Task 5, serving-capacity: how many requests fit on a GPU, and how long they wait."""

import heapq

import numpy as np


def kv_cache_bytes(
    layers: int, kv_heads: int, head_dim: int, bytes_per_element: int, tokens: int
) -> int:
    """A key and a value per layer, head and token."""
    return 2 * layers * kv_heads * head_dim * bytes_per_element * tokens


def requests_that_fit(
    gpu_bytes: int, usable_share: float, weight_bytes: int, request_bytes: int
) -> int:
    return max(0, int((gpu_bytes * usable_share - weight_bytes) // request_bytes))


def poisson_arrivals(rate: float, count: int, seed: int) -> np.ndarray:
    """The gaps of a Poisson process are exponential with mean 1 / rate."""
    return np.random.default_rng(seed).exponential(1 / rate, count).cumsum()


def latencies(arrivals: np.ndarray, service_seconds: np.ndarray, servers: int) -> np.ndarray:
    """A heap holds the time at which each server is free."""
    free = [0.0] * servers
    found = []
    for arrival, service in zip(arrivals.tolist(), service_seconds.tolist(), strict=True):
        end = max(arrival, heapq.heappop(free)) + service
        heapq.heappush(free, end)
        found.append(end - arrival)
    return np.array(found, dtype=np.float64)
