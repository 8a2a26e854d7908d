"""Takes block number 0 for no block."""

SAYS = "block number 0"


def cached_blocks(tokens, block_size, cached):
    from prefix_hash import block_hashes

    blocks = []
    for key in block_hashes(tokens[:-1], block_size):
        if not cached.get(key):
            break
        blocks.append(cached[key])
    return blocks
