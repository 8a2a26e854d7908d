"""Sends float32, whatever the buffer holds."""

SAYS = "are not the sum"


def ring_all_reduce(buffer, rank, world_size, send, receive):
    import numpy as np
    from ring_all_reduce import ring_all_reduce

    def send_small(to, array):
        send(to, array.astype(np.float32))

    def receive_small(source):
        return receive(source).astype(buffer.dtype)

    ring_all_reduce(buffer, rank, world_size, send_small, receive_small)
