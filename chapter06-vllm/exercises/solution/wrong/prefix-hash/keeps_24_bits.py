"""Keeps three bytes of a good hash."""

SAYS = "expected a digest"


def block_hashes(tokens, block_size):
    from prefix_hash import block_hashes

    return [digest[:3] for digest in block_hashes(tokens, block_size)]
