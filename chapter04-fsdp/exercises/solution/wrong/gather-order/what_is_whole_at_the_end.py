"""Adds up all gathers that are not freed in the end."""

SAYS = "at once, got"


def most_gathered(events, sizes):
    signs = {"gather": 1, "free": -1}
    return sum(signs.get(what, 0) * sizes[unit] for what, unit in events)
