"""Sorts uniform times: as many requests in count / rate seconds, never more and never fewer."""

import numpy as np

SAYS = "varies over seeds"


def poisson_arrivals(rate, count, seed):
    return np.sort(np.random.default_rng(seed).uniform(0, count / rate, count))
