"""Cuts chunks of n // K elements, and forgets the rest."""

SAYS = "are not the sum"


def ring_all_reduce(buffer, rank, world_size, send, receive):
    size = len(buffer) // world_size
    chunks = [buffer[i * size : (i + 1) * size] for i in range(world_size)]
    after, before = (rank + 1) % world_size, (rank - 1) % world_size
    for step in range(world_size - 1):
        send(after, chunks[(rank - step) % world_size])
        chunks[(rank - step - 1) % world_size] += receive(before)
    for step in range(world_size - 1):
        send(after, chunks[(rank + 1 - step) % world_size])
        chunks[(rank - step) % world_size][:] = receive(before)
