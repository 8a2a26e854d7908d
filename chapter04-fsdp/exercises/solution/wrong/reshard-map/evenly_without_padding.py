"""Divides as np.array_split does: the first ranks have one element more."""

SAYS = "expected the copies"


def copies_to(target, size, sources, targets):
    from reshard_map import copies_to

    def begin(rank, ranks):
        return rank * (size // ranks) + min(rank, size % ranks)

    copies_to(target, size, sources, targets)
    here = range(begin(target, targets), begin(target + 1, targets))
    both = [
        (s, max(here.start, begin(s, sources)), min(here.stop, begin(s + 1, sources)))
        for s in range(min(sources, 1000))
    ]
    return [
        (s, a - begin(s, sources), a - here.start, b - a) for s, a, b in both if a < b
    ]  # fmt: skip
