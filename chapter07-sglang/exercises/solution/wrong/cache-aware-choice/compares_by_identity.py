"""Compares tokens by `is`, which holds for small numbers alone."""

SAYS = "expected"


def choose(prompt, workers, limit, page_size):
    import cache_aware_choice
    from cache_aware_choice import choose

    def common(one, other):
        count = 0
        while count < min(len(one), len(other)) and one[count] is other[count]:
            count += 1
        return count

    cache_aware_choice.common = common
    return choose(prompt, workers, limit, page_size)
