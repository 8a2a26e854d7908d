"""Every expert takes one token, as nobody has asked."""

SAYS = "expected room for"


def capacity(tokens, experts, factor):
    from balance_router import capacity

    return max(1, capacity(tokens, experts, factor))
