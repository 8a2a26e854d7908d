"""Puts who comes too late into the last place, over somebody else."""

SAYS = "expected place"


def route(logits, factor):
    from balance_router import capacity, route

    expert, place, gate = route(logits, 8.0 * logits.shape[1])
    return expert, place.clamp(max=capacity(*logits.shape, factor) - 1), gate
