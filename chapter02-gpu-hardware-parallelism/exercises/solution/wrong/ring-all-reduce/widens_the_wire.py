"""Sends float64 to be on the safe side: four times the bytes of float16."""

SAYS = "sends float64"


def ring_all_reduce(buffer, rank, world_size, send, receive):
    import numpy as np
    from ring_all_reduce import ring_all_reduce

    wide = np.float64 if buffer.dtype.kind == "f" else buffer.dtype

    def send_wide(to, array):
        send(to, array.astype(wide))

    def receive_wide(source):
        return receive(source).astype(buffer.dtype)

    ring_all_reduce(buffer, rank, world_size, send_wide, receive_wide)
