"""Task 5, global-norm: clip gradients by a norm that no rank knows alone."""

from collections.abc import Callable, Sequence

from torch import Tensor


def global_norm(
    sharded: Sequence[Tensor | None],
    replicated: Sequence[Tensor | None],
    all_reduce: Callable[[float], float],
    replicas: int,
) -> float:
    """The L2 norm of the whole model's gradient, a float of Python, the same on every rank.

    `sharded` are this rank's shards of gradients, any shape, some perhaps empty; each element is in
    `replicas` ranks' shards: once, and in hybrid sharding once in each copy of the model.
    `replicated` are gradients that every rank has whole, and equal. Each element of the model
    counts once, on however many ranks it is. None is a parameter without a gradient.

    `all_reduce` takes a float of Python, and gives the sum of all ranks' values, to all of them. It
    waits for every rank: so each calls it exactly once, also where it has no gradient at all.

    Gradients are float16, bfloat16, float32 or float64; magnitudes are 0, from 1e-15 to 1e15, or
    not finite. Squares and sums are computed in float32 or more. A nan in any gradient of any rank
    makes the norm nan; an infinity without a nan makes it inf. 0.0 where there is no gradient. The
    gradients are not changed.
    """
    raise NotImplementedError("global_norm.global_norm is yours to write")


def clip_factor(norm: float, max_norm: float) -> float:
    """What to multiply gradients of this norm by, so that it is at most `max_norm`: at most 1.0.

    max_norm / norm where the norm is larger than max_norm, else 1.0; nothing is added to the norm,
    and a norm of 0 needs no care. A norm that is inf or nan is mended by no factor: 1.0, and it is
    the caller who skips the step. max_norm may be 0 or inf; ValueError is raised where it is
    negative or nan.
    """
    raise NotImplementedError("global_norm.clip_factor is yours to write")


def clip(
    sharded: Sequence[Tensor | None],
    replicated: Sequence[Tensor | None],
    max_norm: float,
    all_reduce: Callable[[float], float],
    replicas: int,
    in_place: bool,
) -> tuple[float, list[Tensor | None], list[Tensor | None]]:
    """(norm before, sharded, replicated), the gradients multiplied by the factor of the norm.

    With `in_place` the given tensors are changed, in the memory that they have, which others may
    look at, and are those that come back; otherwise they are not, and new ones come back, which
    share no memory with them, also where the factor is 1.0. Shapes, dtypes and None stay. Each
    product is computed in float32 or more, with a factor that is as precise, and rounded once.
    ValueError as in `clip_factor`, before anybody waits for another rank.
    """
    raise NotImplementedError("global_norm.clip is yours to write")
