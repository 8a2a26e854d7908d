"""Takes the token that is missed most, instead of drawing one."""

SAYS = "expected about"


def check_guesses(guesses, q, p, uniform):
    import numpy as np
    from rejection_sampling import pick

    for place, guess in enumerate(guesses):
        if uniform() * q[place][guess] >= p[place][guess]:
            rest = np.eye(len(p[place]))[(p[place] - q[place]).argmax()]
            return [*guesses[:place], pick(rest, uniform)]
    return [*guesses, pick(p[len(guesses)], uniform)]
