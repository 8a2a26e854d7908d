"""Task 5, capacity-routing: which expert computes which token, when each has limited room."""

from dataclasses import dataclass

import numpy as np


@dataclass
class Routing:
    """Where each token goes; its first choice in column 0, its second in column 1."""

    experts: np.ndarray  # [tokens, 2] integers: the chosen experts, dropped or not
    slots: np.ndarray  # [tokens, 2] integers: the place in the expert's batch, -1 where dropped
    weights: (
        np.ndarray
    )  # [tokens, 2] float64: what the expert's output is multiplied by, 0 where dropped
    dropped: int  # choices that found no room


def route(scores: np.ndarray, capacity: int) -> Routing:
    """Top-2 routing with a capacity (Lepikhin et al., arXiv 2006.16668, algorithm 1, simplified).

    scores [tokens, experts]: the router's logits, float64, float32 or integers; at least two
    experts, perhaps no token. They may be large, and are not changed. A token chooses the two
    experts with the highest scores, the one with the lower number where scores are equal, for the
    first choice as for the second. The weights of its choices are the softmax, in float64, over
    these two scores alone; they are not scaled up again where one choice is dropped.

    Each expert has `capacity` slots, 0 or more, for both kinds of choices together: 0, 1, 2, …,
    filled in this order: first every token's first choice, in the order of the tokens, then every
    token's second choice, in the same order. A choice whose expert is full is dropped.
    """
    raise NotImplementedError("capacity_routing.route is yours to write")
