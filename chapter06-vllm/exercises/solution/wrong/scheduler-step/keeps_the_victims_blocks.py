"""Preempts until there is room, and counts the room of the last one only."""

SAYS = "to be preempted, got"


def schedule(waiting, running, free_blocks, block_size, token_budget):
    from dataclasses import replace

    from scheduler_step import schedule

    step = schedule(waiting, running, free_blocks, block_size, token_budget)
    if len(step.preempted) < 2:
        return step
    poor = [replace(r, blocks=0) if r.name in step.preempted[:-1] else r for r in running]
    return schedule(waiting, poor, free_blocks, block_size, token_budget)
