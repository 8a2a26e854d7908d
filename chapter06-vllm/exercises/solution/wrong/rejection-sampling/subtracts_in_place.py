"""Subtracts the draft's distribution where the target's lies."""

SAYS = "q or p was changed"


def check_guesses(guesses, q, p, uniform):
    import numpy as np
    from rejection_sampling import pick

    for place, guess in enumerate(guesses):
        if uniform() * q[place][guess] >= p[place][guess]:
            rest = np.maximum(np.subtract(p[place], q[place], out=p[place]), 0.0, out=p[place])
            return [*guesses[:place], pick(rest, uniform)]
    return [*guesses, pick(p[len(guesses)], uniform)]
