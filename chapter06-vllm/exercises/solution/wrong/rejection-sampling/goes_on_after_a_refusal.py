"""Judges the guesses behind a refused one, which were made for another text."""

SAYS = "what follows it is not looked at"


def check_guesses(guesses, q, p, uniform):
    from rejection_sampling import check_guesses

    tokens = check_guesses(guesses, q, p, uniform)
    if 1 < len(tokens) <= len(guesses):
        tokens += guesses[len(tokens) :]
    return tokens
