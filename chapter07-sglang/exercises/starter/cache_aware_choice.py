"""Task 3, cache-aware-choice: which worker a request is sent to."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Worker:
    """What the router knows of a worker; the grader hands over objects like this."""

    name: str
    cached: list[list[int]]  # the sequences in its prefix cache, of any length, in any order
    queued: int  # prompt tokens that it has yet to compute for others
    requests: int  # that it has, waiting or running
    last: int  # when it was last chosen; -1: never. No two have the same, but for -1


def choose(
    prompt: Sequence[int], workers: Sequence[Worker], limit: int, page_size: int
) -> str | None:
    """The name of the worker that begins to answer `prompt` first.

    A worker that has `limit` requests or more takes none, however much it has cached. Where none is
    left the answer is None. Of the others the one of the lowest cost is chosen:

        cost = queued + missed

    missed are the tokens of the prompt that the worker must compute itself: all but those of the
    longest prefix that one of its cached sequences begins with too, in whole pages of `page_size`
    tokens. A page counts where all of its tokens are in the cached sequence. The last token of
    a prompt is always computed, so a prompt that is cached to its end misses its last page.

    Of several with the lowest cost it is the one with the fewest requests; of several of these the
    one that was chosen longest ago, and one that never was before all others; of several that never
    were, the first in the list.

    The prompt has one token or more; there may be no worker. No argument is changed.
    """
    raise NotImplementedError("cache_aware_choice.choose is yours to write")
