"""Hashes a block with the tokens of the one before it, and no further."""

SAYS = "a sequence would be given"


def block_hashes(tokens, block_size):
    from hashlib import sha256

    whole = range(0, len(tokens) - block_size + 1, block_size)
    blocks = [tokens[i : i + block_size] for i in whole]
    before = [[], *blocks]
    return [sha256(repr(pair).encode()).digest() for pair in zip(before, blocks, strict=False)]
