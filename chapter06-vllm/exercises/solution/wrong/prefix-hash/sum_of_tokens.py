"""Adds the tokens up, so that their order does not count."""

SAYS = "would be given the keys and values of another prefix"


def block_hashes(tokens, block_size):
    whole = range(block_size, len(tokens) + 1, block_size)
    return [(stop, sum(tokens[:stop])) for stop in whole]
