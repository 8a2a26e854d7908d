"""int() of the capacity."""

SAYS = "expected room for"


def capacity(tokens, experts, factor):
    return int(tokens * factor / experts)
