"""Draws one random number a round and uses it wherever one is needed."""

SAYS = "expected about"


def check_guesses(guesses, q, p, uniform):
    from rejection_sampling import check_guesses

    number = uniform()
    return check_guesses(guesses, q, p, lambda: number)
