"""A seventh is no float: 2.25 / 7 * 84 is more than 27."""

SAYS = "expected room for"


def capacity(tokens, experts, factor):
    import math

    return math.ceil(factor / experts * tokens)
