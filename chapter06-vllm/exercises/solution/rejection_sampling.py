"""Task 5, rejection-sampling: the reference solution."""

import numpy as np


def check_guesses(guesses, q, p, uniform):
    tokens = []
    for place, guess in enumerate(guesses):
        if uniform() * q[place][guess] >= p[place][guess]:
            rest = np.maximum(p[place] - q[place], 0.0)
            return [*tokens, pick(rest if rest.any() else p[place], uniform)]
        tokens.append(guess)
    return [*tokens, pick(p[len(guesses)], uniform)]


def pick(weights, uniform):
    """A place of `weights`, as likely as it is large; never one of weight 0."""
    possible = np.flatnonzero(weights)
    sums = np.cumsum(weights[possible], dtype=np.float64)
    place = np.searchsorted(sums, uniform() * sums[-1], side="right")
    return int(possible[min(place, len(possible) - 1)])
