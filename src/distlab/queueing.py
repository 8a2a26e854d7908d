"""Requests that arrive at random, and how long queueing theory says that they wait."""

import numpy as np


def poisson_arrivals(rate: float, count: int, seed: int = 0) -> np.ndarray:
    """Times [count] in seconds, ascending, of a Poisson process of `rate` per second.

    The same `seed` gives the same pattern at any rate, faster or slower.
    Source: Ross, "Introduction to Probability Models", section 5.3: the gaps are exponential.
    """
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count))


def waits(arrivals: np.ndarray, service: float) -> np.ndarray:
    """Each request's wait in seconds, [count], if every one takes `service` seconds, in order.

    w[i + 1] = max(0, w[i] + service - gap[i]). It speaks of these very arrivals, where `mean_wait`
    speaks of an endless queue. Source: Lindley's recursion (Kleinrock, volume 1, section 8.1).
    """
    waiting = np.zeros_like(arrivals)
    for i, gap in enumerate(np.diff(arrivals)):
        waiting[i + 1] = max(0.0, waiting[i] + service - gap)
    return waiting


def mean_wait(rate: float, services: np.ndarray) -> float:
    """The mean wait in seconds in the queue M/G/1: rate · E[S²] / (2 · (1 - rate · E[S])).

    One server, in order of arrival; `services` are samples of its service time S in seconds (all
    alike: M/D/1). Raises ValueError where the load rate · E[S] is 1 or more: the queue never ends.
    Source: the Pollaczek-Khinchine formula; Kleinrock, "Queueing Systems" volume 1, section 5.6.
    """
    load = rate * float(np.mean(services))
    if load >= 1:
        raise ValueError(f"a load of {load:.2f} has no steady state")
    return rate * float(np.mean(np.square(services))) / (2 * (1 - load))
