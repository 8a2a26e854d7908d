"""Tells its neighbour with an empty message that it is done; the neighbour never asks."""

SAYS = "was never received"


def ring_all_reduce(buffer, rank, world_size, send, receive):
    from ring_all_reduce import ring_all_reduce

    ring_all_reduce(buffer, rank, world_size, send, receive)
    if world_size > 1:
        send((rank + 1) % world_size, buffer[:0])
