"""Counts a block more where the last one is exactly full: // + 1 for a ceiling."""

SAYS = "expected"


def schedule(waiting, running, free_blocks, block_size, token_budget):
    from scheduler_step import schedule

    step = schedule(waiting, running, free_blocks, block_size, token_budget)
    need = {r.name: (r.computed, r.blocks) for r in [*waiting, *running]}
    for place, (name, count) in enumerate(step.chunks):
        computed, blocks = need[name]
        free_blocks -= max(0, (computed + count) // block_size + 1 - blocks)
        if free_blocks < 0:
            step.chunks = step.chunks[:place]
            break
    return step
