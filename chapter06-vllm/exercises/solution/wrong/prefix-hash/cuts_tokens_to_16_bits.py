"""Takes two bytes of each token, as in the days of small vocabularies."""

SAYS = "a sequence would be given"


def block_hashes(tokens, block_size):
    from prefix_hash import block_hashes

    return block_hashes([token % 2**16 for token in tokens], block_size)
