"""Task 3, plan-memory: the bytes that a rank holds in a sharded step, kind by kind."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """How a model is spread; the grader hands over objects like this. All sizes are in bytes."""

    mode: str  # "full", "grad", "hybrid" or "none", see plan_memory
    ranks: int  # of the job
    replicas: int  # how often the job has the model in "hybrid"; no other mode looks at it
    prefetch: int  # how many units are gathered ahead of a compute
    weight: int  # of a parameter, as shards keep it
    gradient: int  # of its gradient, beside the shard
    optimizer: int  # of the optimizer's state for it, 8 for AdamW's moments in float32
    gathered: int  # of it in a unit that is whole, 2 in bfloat16
    reduced: int  # of its gradient in a unit whose gradient is whole


def plan_memory(units: Sequence[int], settings: Settings) -> dict[str, int]:
    """The most bytes that each kind takes on a rank, and "peak", the most of all at one moment.

    `units` are the numbers of parameters (1 or more) of each unit, in the order of the forward
    pass, which uses each once. The ranks that share a copy of the model keep each unit's weights,
    gradients and optimizer state in shards of one length; what does not divide evenly is padded, so
    a whole unit, too, has as many elements as all its shards together. All ranks share one copy,
    but "hybrid" has `replicas` of them, on ranks / replicas ranks each. The kinds:

      "weights", "optimizer"  the shards of all units: always there
      "gradients"   of the shards: each from its unit's reduction to the end of the step
      "gathered"    whole units
      "reducing"    the whole gradient of one unit, in its backward compute and its reduction

    The moments, in each of which all that is named here is held, and weights and optimizer with it:

      backward of a unit  whole: it and the `prefetch` units before it; its whole gradient;
                          the gradients of the shards of all units behind it
      its reduction       as in its backward, but the unit itself is no longer whole, and the
                          gradient of its shard is there too, beside the whole one
      optimizer step      the gradients of all shards; nothing is whole

    As many units are whole in forward, but no gradient is there: the peak is not in it. In "grad" a
    unit stays whole from forward to the end of its backward: all units before the one in backward
    are whole, whatever `prefetch` is. In "none" every rank has all the model without padding,
    weights, gradients and optimizer state, at every moment; nothing is gathered, and gradients are
    reduced where they are.

    Exact whole numbers, ints of Python, up to models of 10**18 parameters; 0 where there is no
    unit. ValueError is raised for another mode, a negative prefetch, fewer ranks than 1, and in
    "hybrid" for replicas below 1 or such as do not divide the ranks.
    """
    raise NotImplementedError("plan_memory.plan_memory is yours to write")


def fewest_ranks(units: Sequence[int], settings: Settings, budget: int, most: int) -> int | None:
    """The smallest number of ranks, 1 to `most`, with which the peak is at most `budget` bytes.

    None where no number is enough. The other settings stay as they are, whatever
    `settings.ranks` is; in "hybrid" only multiples of `replicas` are possible. Padding makes some
    numbers of ranks worse than a smaller one. Neither `units` nor `settings` is changed.
    """
    raise NotImplementedError("plan_memory.fewest_ranks is yours to write")
