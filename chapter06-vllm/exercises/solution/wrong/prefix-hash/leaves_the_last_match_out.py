"""Leaves a block out of every prompt of whole blocks, also where its end is not cached."""

SAYS = "one token at least is left"


def cached_blocks(tokens, block_size, cached):
    from prefix_hash import cached_blocks

    found = cached_blocks([*tokens, 0], block_size, cached)
    return found[:-1] if len(tokens) % block_size == 0 else found
