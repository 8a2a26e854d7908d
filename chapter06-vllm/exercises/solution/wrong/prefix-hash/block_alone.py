"""Hashes a block's own tokens, whatever came before."""

SAYS = "would be given the keys and values of another prefix"


def block_hashes(tokens, block_size):
    from prefix_hash import block_hashes

    whole = range(0, len(tokens) - block_size + 1, block_size)
    return [block_hashes(tokens[i : i + block_size], block_size)[0] for i in whole]
