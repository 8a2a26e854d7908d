"""Lets the first request come at 0, as if the gap before it were none."""

SAYS = "the first request comes after a gap too"


def poisson_arrivals(rate, count, seed):
    from serving_capacity import poisson_arrivals

    arrivals = poisson_arrivals(rate, count, seed)
    return arrivals - arrivals[:1]
