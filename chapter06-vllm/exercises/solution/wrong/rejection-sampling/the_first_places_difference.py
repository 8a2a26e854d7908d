"""Takes what is missing at the first place for all later ones."""

SAYS = "the random number"


def check_guesses(guesses, q, p, uniform):
    import numpy as np
    from rejection_sampling import pick

    for place, guess in enumerate(guesses):
        if uniform() * q[place][guess] >= p[place][guess]:
            rest = np.maximum(p[0] - q[0], 0.0)
            rest = rest * (p[place] > 0) if (rest * p[place]).any() else p[place]
            return [*guesses[:place], pick(rest, uniform)]
    return [*guesses, pick(p[len(guesses)], uniform)]
