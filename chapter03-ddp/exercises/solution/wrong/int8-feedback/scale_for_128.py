"""Divides by 128, so that the largest value wraps round to -128."""

SAYS = "-128 is outside"


def make_compressor(size):
    import numpy as np
    from int8_feedback import Int8WithFeedback

    class Wrapping(Int8WithFeedback):
        def compress(self, gradient):
            wanted = gradient + self.residual
            scale = float(np.abs(wanted).max()) / 128
            steps = np.rint(wanted / scale if scale else wanted)
            quantised = steps.astype(np.int16).astype(np.int8)
            self.residual = wanted - quantised * np.float32(scale)
            return quantised, scale

    return Wrapping(size)
