"""start and stop count from the beginning of the buffer, not of the tensor."""

SAYS = "expected the pieces"


def pieces(shapes, rank, ranks):
    import math

    from shard_flat_buffer import pieces

    begins = [sum(map(math.prod, shapes[:number])) for number in range(len(shapes))]
    return [
        (n, begins[n] + start, begins[n] + stop) for n, start, stop in pieces(shapes, rank, ranks)
    ]
