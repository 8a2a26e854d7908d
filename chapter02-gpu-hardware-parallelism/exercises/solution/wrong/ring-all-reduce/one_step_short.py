"""Hands the sums round for one step too few."""

import numpy as np

SAYS = "are not the sum"


def ring_all_reduce(buffer, rank, world_size, send, receive):
    chunks = np.array_split(buffer, world_size)
    after, before = (rank + 1) % world_size, (rank - 1) % world_size
    for step in range(world_size - 1):
        send(after, chunks[(rank - step) % world_size])
        chunks[(rank - step - 1) % world_size] += receive(before)
    for step in range(world_size - 2):
        send(after, chunks[(rank + 1 - step) % world_size])
        chunks[(rank - step) % world_size][:] = receive(before)
