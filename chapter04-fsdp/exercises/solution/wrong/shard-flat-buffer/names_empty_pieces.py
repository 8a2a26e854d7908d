"""Lists every tensor that the shard touches, empty ones too."""

SAYS = "expected the pieces"


def pieces(shapes, rank, ranks):
    import math

    from shard_flat_buffer import pieces

    own = pieces(shapes, rank, ranks)
    empty = [(number, 0, 0) for number, shape in enumerate(shapes) if not math.prod(shape)]
    return sorted([*own, *empty]) if own else own
