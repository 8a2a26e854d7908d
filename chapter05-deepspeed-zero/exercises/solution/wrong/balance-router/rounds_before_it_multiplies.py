"""Rounds the tokens of an expert up, then what the factor makes of them."""

SAYS = "expected room for"


def capacity(tokens, experts, factor):
    import math

    return math.ceil(math.ceil(tokens / experts) * factor)
