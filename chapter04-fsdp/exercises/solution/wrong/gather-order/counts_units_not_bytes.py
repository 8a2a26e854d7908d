"""The most units at once, times the largest."""

SAYS = "at once, got"


def most_gathered(events, sizes):
    from gather_order import most_gathered

    return most_gathered(events, dict.fromkeys(sizes, 1)) * max(sizes.values(), default=0)
