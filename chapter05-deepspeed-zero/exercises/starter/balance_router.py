"""Task 5, balance-router: which expert computes which token, and how all of them get some.

Everywhere below `logits` [tokens, experts] are the router's, float32 or bfloat16. They may be -inf,
though not all of one token. There is an expert at least, but perhaps no token.
"""

from torch import Tensor


def capacity(tokens: int, experts: int, factor: float) -> int:
    """The most tokens that an expert takes: tokens * factor / experts, rounded up.

    `factor` is a multiple of 1/8, 0 or more, so that this can be computed exactly.
    """
    raise NotImplementedError("balance_router.capacity is yours to write")


def route(logits: Tensor, factor: float) -> tuple[Tensor, Tensor, Tensor]:
    """(expert, place, gate) of each token, [tokens] each: int64, int64 and float32.

    A token goes to the expert of its highest logit, the lowest-numbered one where some are equal
    as they were given. An expert's places 0, 1, 2, … are filled in the order of the tokens; who
    finds all `capacity` places taken is dropped. Its expert is told all the same; its place is -1.

    The gate is what the expert's output is multiplied by: the softmax's value for this expert,
    computed in float32, and 0 where the token is dropped. The gradient flows to the logits through
    the gates of tokens that are kept.
    """
    raise NotImplementedError("balance_router.route is yours to write")


def balancing_loss(logits: Tensor) -> Tensor:
    """The auxiliary loss of Switch Transformers (Fedus et al., arXiv 2101.03961, equations 4 to 6).

    experts * sum over all experts of f * p, a float32 tensor without dimensions: f is the fraction
    of the tokens that chose the expert, dropped or not, p the mean of the softmax's value for it
    over all tokens, computed in float32. The gradient flows through p alone, f counts. Without
    tokens the loss is 0.
    """
    raise NotImplementedError("balance_router.balancing_loss is yours to write")
