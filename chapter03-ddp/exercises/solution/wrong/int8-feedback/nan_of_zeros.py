"""Divides zeros by a scale of zero."""

SAYS = "the scale is nan"


def make_compressor(size):
    import numpy as np
    from int8_feedback import Int8WithFeedback

    class Naive(Int8WithFeedback):
        def compress(self, gradient):
            wanted = gradient + self.residual
            scale = np.abs(wanted).max() / np.float32(127)
            quantised = np.rint(wanted / scale).astype(np.int8)
            self.residual = wanted - quantised * scale
            return quantised, float(scale) or float("nan")

    return Naive(size)
