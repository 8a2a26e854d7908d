"""Makes room at the expense of who has waited longest."""

SAYS = "to be preempted, got"


def schedule(waiting, running, free_blocks, block_size, token_budget):
    from dataclasses import replace

    from scheduler_step import schedule

    step = schedule(waiting, running, free_blocks, block_size, token_budget)
    if not step.preempted:
        return step
    turned = [replace(request, arrival=-request.arrival) for request in running]
    step = schedule(waiting, turned, free_blocks, block_size, token_budget)
    step.chunks.reverse()
    return step
