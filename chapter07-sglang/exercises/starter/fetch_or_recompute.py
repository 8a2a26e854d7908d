"""Task 5, fetch-or-recompute: is a slow copy of keys and values better than computing them?"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Tier:
    """A place that keeps keys and values; the grader hands over objects like this."""

    name: str
    latency: int  # before the first block of it arrives
    block_time: int  # of each block: its bytes over the tier's bandwidth


def plan_time(
    plan: Sequence[str],
    tokens: int,
    block_size: int,
    tiers: Sequence[Tier],
    linear: int,
    quadratic: int,
) -> int:
    """How long it takes to have the keys and values of a prompt of `tokens` tokens.

    plan[i] is the name of the tier that the prompt's i-th block of block_size tokens is fetched
    from; all tokens behind these blocks are computed. First the blocks are fetched, one after
    another: each tier that is used costs its latency once, however many blocks come from it, and
    its block_time for each. Then the others are computed: the token at place p, counted from 0,
    costs linear + quadratic * (p + 1), for it attends to p + 1 tokens. All times are whole
    nanoseconds, and so is the sum.
    """
    raise NotImplementedError("fetch_or_recompute.plan_time is yours to write")


def fetch_plan(
    held: Sequence[Sequence[str]],
    tokens: int,
    block_size: int,
    tiers: Sequence[Tier],
    linear: int,
    quadratic: int,
) -> list[str]:
    """The fastest plan: the name of a tier for each of the leading blocks that are fetched.

    held[i] names the tiers that hold the prompt's i-th block, in any order; it may be none. There
    is one entry for each whole block of the prompt. Keys and values depend on all tokens before
    them, so a block can only be fetched where all before it are. The last token of the prompt is
    always computed, and with it the block that it is in.

    Of plans that take equally long one that fetches the fewest blocks is returned, for the network
    has other work; it may be any of these. There are up to 4 tiers and 2,000 blocks, so
    trying every plan takes too long. Tiers may be equally fast, or take no time at all. The prompt
    has one token or more, and no argument is changed.
    """
    raise NotImplementedError("fetch_or_recompute.fetch_plan is yours to write")
