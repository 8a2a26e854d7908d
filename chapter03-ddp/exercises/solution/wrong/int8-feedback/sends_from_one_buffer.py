"""Writes every message into the same memory."""

SAYS = "a later compress changed the message before it"


def make_compressor(size):
    import numpy as np
    from int8_feedback import Int8WithFeedback

    class Thrifty(Int8WithFeedback):
        buffer = np.zeros(size, dtype=np.int8)

        def compress(self, gradient):
            self.buffer[:], scale = super().compress(gradient)
            return self.buffer, scale

    return Thrifty(size)
