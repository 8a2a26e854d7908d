"""Binds your code to the grader: the tests call these functions, and nothing else of yours.

Organise your work as you like; only keep these names and arguments. Each import stands inside its
function, so that a task that you have not begun does not break the others.
"""


def make_block_manager(num_blocks, block_size):
    from block_manager import BlockManager

    return BlockManager(num_blocks, block_size)


def schedule(waiting, running, free_blocks, block_size, token_budget):
    from scheduler_step import schedule

    return schedule(waiting, running, free_blocks, block_size, token_budget)


def write_keys_and_values(cache, table, start, keys, values):
    from paged_attention import write

    write(cache, table, start, keys, values)


def paged_attention(queries, cache, table, start):
    from paged_attention import attend

    return attend(queries, cache, table, start)


def block_hashes(tokens, block_size):
    from prefix_hash import block_hashes

    return block_hashes(tokens, block_size)


def cached_blocks(tokens, block_size, cached):
    from prefix_hash import cached_blocks

    return cached_blocks(tokens, block_size, cached)


def check_guesses(guesses, q, p, uniform):
    from rejection_sampling import check_guesses

    return check_guesses(guesses, q, p, uniform)


def nucleus(logits, temperature, top_p):
    from nucleus_sampling import nucleus

    return nucleus(logits, temperature, top_p)


def draw(probabilities, uniform):
    from nucleus_sampling import draw

    return draw(probabilities, uniform)
