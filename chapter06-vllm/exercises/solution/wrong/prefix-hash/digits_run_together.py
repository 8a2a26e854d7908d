"""Writes the tokens' digits without anything between them: 1, 23 is 12, 3."""

SAYS = "a sequence would be given"


def block_hashes(tokens, block_size):
    from hashlib import sha256

    whole = range(0, len(tokens) - block_size + 1, block_size)
    blocks = [tokens[i : i + block_size] for i in whole]
    digits = ["".join(map(str, tokens[: i + block_size])) for i in whole]
    return [sha256(f"{i} {one}".encode()).digest() for i, one in enumerate(digits) if blocks]
