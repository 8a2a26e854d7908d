"""Calls itself for each token, and Python stops it in a long prompt."""

SAYS = "RecursionError"


def choose(prompt, workers, limit, page_size):
    import cache_aware_choice
    from cache_aware_choice import choose

    def common(one, other):
        same = one and other and one[0] == other[0]
        return 1 + common(one[1:], other[1:]) if same else 0

    cache_aware_choice.common = common
    return choose(prompt, workers, limit, page_size)
