"""Few kinds of tokens, so that sequences have much in common, and such as are easily confused."""


def token_kinds(chance):
    """Three in any order: small, alike when written one behind the other, or in few bits."""
    large = int(chance.integers(300, 130_000))
    kinds = [[0, 1, 2], [1, 11, 111], [large, large + 2**8, large + 2**16]]
    return chance.permutation(kinds[chance.integers(3)]).tolist()
