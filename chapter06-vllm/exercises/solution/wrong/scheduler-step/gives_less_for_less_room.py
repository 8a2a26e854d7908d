"""Cuts a chunk to the blocks that are free, instead of making room or waiting."""

SAYS = "expected"


def schedule(waiting, running, free_blocks, block_size, token_budget):
    from dataclasses import replace

    from scheduler_step import schedule

    room = free_blocks * block_size
    cut = [replace(r, tokens=min(r.tokens, room)) for r in waiting if room]
    return schedule(cut, running, free_blocks, block_size, token_budget)
