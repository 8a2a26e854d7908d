"""Forgets what it could not send."""

SAYS = "with what was left over before"


def make_compressor(size):
    import numpy as np
    from int8_feedback import Int8WithFeedback

    class Forgetful(Int8WithFeedback):
        def compress(self, gradient):
            self.residual = np.zeros(size, dtype=np.float32)
            return super().compress(gradient)

    return Forgetful(size)
