"""Computes every result in the same array, which the caller still holds."""

SAYS = "a later call changes an earlier result"


def make_online_attention(queries):
    import numpy as np
    from online_softmax import OnlineAttention

    class Buffered(OnlineAttention):
        buffer = None

        def result(self):
            result = super().result()
            if self.buffer is None or self.buffer.shape != result.shape:
                self.buffer = np.empty_like(result)
            self.buffer[...] = result
            return self.buffer

    return Buffered(queries)
