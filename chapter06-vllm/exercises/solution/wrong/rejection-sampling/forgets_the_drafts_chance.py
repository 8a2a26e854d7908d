"""Accepts a guess as often as the target says it, as if the draft had not chosen it."""

SAYS = "the random number"


def check_guesses(guesses, q, p, uniform):
    import numpy as np
    from rejection_sampling import pick

    for place, guess in enumerate(guesses):
        if uniform() * q[place].max() >= p[place][guess]:
            rest = np.maximum(p[place] - q[place], 0.0)
            rest = rest if rest.any() else p[place]
            return [*guesses[:place], pick(rest, uniform)]
    return [*guesses, pick(p[len(guesses)], uniform)]
