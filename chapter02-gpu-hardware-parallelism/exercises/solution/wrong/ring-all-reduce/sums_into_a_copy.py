"""Works on a copy of the buffer, which nobody sees."""

SAYS = "are not the sum"


def ring_all_reduce(buffer, rank, world_size, send, receive):
    from ring_all_reduce import ring_all_reduce

    buffer = buffer.copy()
    ring_all_reduce(buffer, rank, world_size, send, receive)
