"""Gives both choices of a token their slots before the next token comes."""

SAYS = "have expert 0 as their first choice"


def route(scores, capacity):
    import numpy as np
    from capacity_routing import Routing, route

    plenty = route(scores, 10**9)
    slots, filled = np.full(plenty.slots.shape, -1), [0] * scores.shape[1]
    for token in range(len(scores)):
        for choice in (0, 1):
            expert = plenty.experts[token, choice]
            if filled[expert] < capacity:
                slots[token, choice] = filled[expert]
                filled[expert] += 1
    return Routing(plenty.experts, slots, plenty.weights * (slots >= 0), int((slots < 0).sum()))
