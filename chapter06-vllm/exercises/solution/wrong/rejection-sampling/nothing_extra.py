"""Throws away the token that a pass gives for free."""

SAYS = "accepted, and p[1] gives 1"


def check_guesses(guesses, q, p, uniform):
    from rejection_sampling import check_guesses

    return check_guesses(guesses, q, p, uniform)[: max(1, len(guesses))]
