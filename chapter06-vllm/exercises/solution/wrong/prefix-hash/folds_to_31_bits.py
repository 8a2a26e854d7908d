"""Folds the hash to an int that looks long, of which 31 bits count."""

SAYS = "different ones"


def block_hashes(tokens, block_size):
    from prefix_hash import block_hashes

    folded = [int.from_bytes(one, "big") % (2**31 - 1) for one in block_hashes(tokens, block_size)]
    return [f"{one:064x}" for one in folded]
