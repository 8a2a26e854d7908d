"""Draws again from the distance of the two, also where the draft says more."""

SAYS = "only 2 has more in p than in q"


def check_guesses(guesses, q, p, uniform):
    import numpy as np
    from rejection_sampling import pick

    for place, guess in enumerate(guesses):
        if uniform() * q[place][guess] >= p[place][guess]:
            rest = np.abs(p[place] - q[place]) * (p[place] > 0)
            return [*guesses[:place], pick(rest, uniform)]
    return [*guesses, pick(p[len(guesses)], uniform)]
