"""Task 2, overlap-model: when a step ends whose all-reduces run beside its backward pass."""

from collections.abc import Sequence


def step_end(ready: Sequence[float], sizes: Sequence[float], alpha: float, beta: float) -> float:
    """When the last bucket has been reduced, in seconds from the beginning of the backward pass.

    Bucket i is full at ready[i] and has sizes[i] bytes; its all-reduce takes
    alpha + beta * sizes[i] seconds. All of them share one link: they go one after another, in the
    order of their numbers, which every rank keeps to even where a later bucket is full before an
    earlier one. 0.0 where there is no bucket. `alpha` and `beta` may be 0. No function of this task
    changes the lists that it is given.
    """
    raise NotImplementedError("overlap_model.step_end is yours to write")


def fill_buckets(
    gradients: Sequence[tuple[float, float]], bucket_bytes: float
) -> tuple[list[float], list[float]]:
    """(ready, sizes) of the buckets that `gradients` fill, as `step_end` takes them.

    Each gradient is (seconds when it is ready, bytes, 1 or more), in the order in which they are
    ready; several may be ready at once. A bucket takes the next one if with it it holds at most
    `bucket_bytes`, and is closed otherwise; a larger gradient has a bucket of its own. A bucket is
    full when its last gradient is ready. Two empty lists where there is no gradient.
    """
    raise NotImplementedError("overlap_model.fill_buckets is yours to write")


def best_bucket_bytes(
    gradients: Sequence[tuple[float, float]],
    candidates: Sequence[float],
    alpha: float,
    beta: float,
) -> float:
    """The candidate with which the step ends first; the largest of them where several do.

    Steps that end less than 1e-12 s behind the first end with it. At least one candidate is given,
    in any order, and one of them is returned, also where there is no gradient.
    """
    raise NotImplementedError("overlap_model.best_bucket_bytes is yours to write")
