"""Leaves nothing to compute when the whole prompt is cached."""

SAYS = "the last one is left to compute"


def cached_blocks(tokens, block_size, cached):
    from prefix_hash import cached_blocks

    return cached_blocks([*tokens, 0], block_size, cached)
