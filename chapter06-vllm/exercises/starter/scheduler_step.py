"""Task 2, scheduler-step: what the next forward pass computes, and who makes room for it."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Request:
    """What the scheduler needs to know of a request; the grader hands over objects like this."""

    name: str
    arrival: int  # no two requests have the same
    tokens: int  # prompt and output so far
    computed: int  # of these, how many have their keys and values in the cache
    blocks: int  # of the cache, that it holds; may be more than these need


@dataclass
class Step:
    """What one pass does. `chunks` are pairs (name, tokens to compute), at least 1 token each."""

    chunks: list[tuple[str, int]]
    preempted: list[str]


def schedule(
    waiting: Sequence[Request],
    running: Sequence[Request],
    free_blocks: int,
    block_size: int,
    token_budget: int,
) -> Step:
    """Plan one step of continuous batching with chunked prefill and preemption.

    A request asks for the tokens that are not computed, tokens - computed: 1 where it decodes, more
    where a prompt is not yet through. It gets as many of them as are left of `token_budget`, which
    counts the tokens of the whole step. Where none is left the plan is made.

    To compute n tokens a request must hold ceil((computed + n) / block_size) blocks; what is
    missing is taken from the free ones.

    First come the running requests, by arrival. Where one finds too few free blocks, the latest
    arrived of the running requests is preempted, until there is room: its blocks are free then, and
    it has no part in this step. This may be the request itself, which then is the last to be looked
    at, since all later ones are gone.

    Then, if nobody was preempted, come the waiting requests, by arrival. The first one that finds
    too few free blocks ends the plan: nobody overtakes. Waiting requests hold no blocks, and
    their `computed` is 0.

    `chunks` are in the order of planning, `preempted` in that of preemption. The lists come in any
    order, and any may be empty; `token_budget` is 1 or more, `free_blocks` may be 0. Neither the
    requests nor the lists are changed.
    Source: Yu et al., "Orca", OSDI 2022; Kwon et al., "PagedAttention", SOSP 2023, section 4.5;
    Agrawal et al., "Sarathi-Serve", OSDI 2024, algorithm 3.
    """
    raise NotImplementedError("scheduler_step.schedule is yours to write")
