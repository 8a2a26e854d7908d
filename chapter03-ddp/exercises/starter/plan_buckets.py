"""Task 1, plan-buckets: which gradients travel together."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Parameter:
    """What the plan needs to know of a parameter; the grader hands over objects like this."""

    name: str
    storage: int  # two parameters of one storage are tied: one weight under two names
    nbytes: int
    requires_grad: bool


def plan_buckets(
    parameters: Sequence[Parameter], bucket_bytes: int, first_bucket_bytes: int
) -> list[list[str]]:
    """The names of the parameters in each bucket, in the order in which buckets are sent.

    `parameters` come in the order in which the forward pass uses them; their gradients are ready in
    the opposite order, and fill the buckets in it. A tied weight's gradient is whole only when the
    backward pass has come to its first use: it counts once, there, and under that name, however
    many names it has. A frozen parameter (requires_grad False) has no gradient. Names and numbers
    of storages say nothing of the order. `parameters` is not changed.

    A bucket takes the next gradient if with it it holds at most `bucket_bytes`, the first bucket at
    most `first_bucket_bytes`: it is sent early when it is small. Else the bucket is closed. A
    gradient that is larger than the cap has a bucket of its own, the first too. No bucket is empty,
    and where there is no gradient there is no bucket. All sizes are whole bytes, 1 or more; either
    cap may be the larger one.
    Source: Li et al., "PyTorch Distributed", VLDB 2020, section 3.2.3.
    """
    raise NotImplementedError("plan_buckets.plan_buckets is yours to write")
