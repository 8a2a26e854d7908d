"""Task 1, shard-optimizer: ZeRO's stage 1, in which each rank updates its own part of the model."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


class ShardedOptimizer:
    """The optimizer of one of `ranks` ranks, which keeps the state of this rank's part alone.

    All ranks hold the same weights, in one flat tensor of n numbers. Part r, of ceil(n / ranks)
    numbers, is rank r's to update; where the last parts have fewer numbers left, or none, zeros
    fill them up. After each step the weights are those of one process that has the mean gradient.
    """

    def __init__(
        self,
        weights: Tensor,
        rank: int,
        ranks: int,
        make_optimizer: Callable[[list[Tensor]], Any],
    ) -> None:
        """`weights` [n], float32 or bfloat16, is this rank's copy, which `step` changes in place.

        `make_optimizer` makes an optimizer for a list of tensors, whose step() and zero_grad() are
        like torch's: each tensor is updated by its `grad`. It is called once, with one tensor: a
        copy of the part, [ceil(n / ranks)], always float32, which keeps what bfloat16 weights would
        round away. The weights may require a gradient; the copy has no history.
        ValueError is raised where `rank` is none of `ranks`, or the weights have not one dimension.
        """
        raise NotImplementedError("ShardedOptimizer.__init__ is yours to write")

    def step(
        self,
        gradient: Tensor,
        reduce_scatter: Callable[[Tensor], Tensor],
        all_gather: Callable[[Tensor], Tensor],
    ) -> None:
        """Update the part by the ranks' mean gradient, then all weights from all parts.

        `gradient` [n], in the weights' dtype, is this rank's own, and is not changed. Both
        collectives wait for all ranks; each rank calls each of them once, in this order:

          reduce_scatter  [ranks * ceil(n / ranks)] float32 -> this rank's part of the ranks' sum
          all_gather      [ceil(n / ranks)] in the weights' dtype -> all parts, one behind another

        The weights are changed in the memory that they have, since the model computes with it.
        From step to step nothing stays but the part and its optimizer's state: no gradient.
        """
        raise NotImplementedError("ShardedOptimizer.step is yours to write")
