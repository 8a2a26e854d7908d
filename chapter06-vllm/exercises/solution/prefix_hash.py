"""Task 4, prefix-hash: the reference solution."""

from array import array
from hashlib import sha256
from itertools import takewhile


def block_hashes(tokens, block_size):
    hashes, before = [], b""
    for stop in range(block_size, len(tokens) + 1, block_size):
        own = array("Q", tokens[stop - block_size : stop]).tobytes()
        before = sha256(before + own).digest()
        hashes.append(before)
    return hashes


def cached_blocks(tokens, block_size, cached):
    usable = block_hashes(tokens[:-1], block_size)
    return [cached[key] for key in takewhile(cached.__contains__, usable)]
