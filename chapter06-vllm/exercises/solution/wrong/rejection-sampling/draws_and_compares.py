"""Draws from the target and accepts a guess that is the same: correct, but seldom."""

SAYS = "is 0.5 and the random number 0.4"


def check_guesses(guesses, q, p, uniform):
    from rejection_sampling import pick

    tokens = []
    for place in range(len(guesses) + 1):
        tokens.append(pick(p[place], uniform))
        if place < len(guesses) and tokens[-1] != guesses[place]:
            break
    return tokens
