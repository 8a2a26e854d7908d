"""A chain: sums go from worker 0 to the last one, results once more round, chunk by chunk.

The neighbours, the chunks and the total are a ring's, but the last workers send half of the rest.
"""

import numpy as np

SAYS = "in a ring each sends all chunks but one, twice"


def ring_all_reduce(buffer, rank, world_size, send, receive):
    after, before, last = (rank + 1) % world_size, (rank - 1) % world_size, world_size - 1
    for chunk in np.array_split(buffer, world_size):
        if rank:
            chunk += receive(before)
        if rank < last:
            send(after, chunk)
    for chunk in np.array_split(buffer, world_size) if last else []:
        if rank < last:
            chunk[:] = receive(before)
        if rank != last - 1:
            send(after, chunk)
