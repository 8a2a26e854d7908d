"""Hands whole buffers round the ring: right, but K / 2 times the bytes."""

SAYS = "a chunk has at most"


def ring_all_reduce(buffer, rank, world_size, send, receive):
    travelling = buffer.copy()
    for _ in range(world_size - 1):
        send((rank + 1) % world_size, travelling)
        travelling = receive((rank - 1) % world_size)
        buffer += travelling
