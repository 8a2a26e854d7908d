"""Replaces a refused guess by a sample of the target's whole distribution."""

SAYS = "only 2 has more in p than in q"


def check_guesses(guesses, q, p, uniform):
    from rejection_sampling import pick

    for place, guess in enumerate(guesses):
        if uniform() * q[place][guess] >= p[place][guess]:
            return [*guesses[:place], pick(p[place], uniform)]
    return [*guesses, pick(p[len(guesses)], uniform)]
