"""A bisection that begins with a billion elements: the largest model that it can think of."""

SAYS = "expected"


def largest_model(settings, parameters, device, host, file):
    from stage_memory import largest_model

    return min(10**9, largest_model(settings, parameters, device, host, file))
