"""Rounds the shares to percent, as they are shown, before it compares them."""

SAYS = "nearly the same share"


def bottleneck(trace):
    from read_profile import time_shares

    shares = time_shares(trace)
    return max(shares, key=lambda cause: round(shares[cause], 2))
