"""Adds the hashes of the blocks up, so that AB and BA are one prefix."""

SAYS = "a sequence would be given"


def block_hashes(tokens, block_size):
    from hashlib import sha256
    from itertools import accumulate

    whole = range(0, len(tokens) - block_size + 1, block_size)
    blocks = [tokens[i : i + block_size] for i in whole]
    own = [int.from_bytes(sha256(repr(block).encode()).digest(), "big") for block in blocks]
    return [total % 2**256 for total in accumulate(own)]
