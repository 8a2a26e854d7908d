"""Accepts every guess of which the target says more than a half of the draft's."""

SAYS = "expected [2], got"


def check_guesses(guesses, q, p, uniform):
    from rejection_sampling import check_guesses

    for place, guess in enumerate(guesses):
        if p[place][guess] < 0.5 * q[place][guess]:
            return check_guesses(guesses[:place], q[:place], p[: place + 1], uniform)
    return check_guesses([], q, p[len(guesses) :], uniform)[:0] + [
        *guesses,
        *check_guesses([], q, p[len(guesses) :], uniform),
    ]
