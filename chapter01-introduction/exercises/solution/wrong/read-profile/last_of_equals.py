"""Names the last of equal shares."""

SAYS = "have the same share"


def bottleneck(trace):
    from read_profile import time_shares

    return max(reversed(time_shares(trace).items()), key=lambda pair: pair[1])[0]
