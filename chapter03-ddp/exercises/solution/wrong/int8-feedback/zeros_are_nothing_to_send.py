"""Sends nothing for a gradient of zeros, although something is left over from before."""

SAYS = "with what was left over before"


def make_compressor(size):
    import numpy as np
    from int8_feedback import Int8WithFeedback

    class Saving(Int8WithFeedback):
        def compress(self, gradient):
            if not gradient.any():
                return np.zeros(len(gradient), dtype=np.int8), 0.0
            return super().compress(gradient)

    return Saving(size)
