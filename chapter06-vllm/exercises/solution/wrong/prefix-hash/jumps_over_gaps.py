"""Takes every block that is cached, also behind one that is not."""

SAYS = "the second block was evicted"


def cached_blocks(tokens, block_size, cached):
    from prefix_hash import block_hashes

    return [cached[key] for key in block_hashes(tokens[:-1], block_size) if key in cached]
