"""Guards the division by an epsilon, below which small gradients are rounded to nothing."""

SAYS = "the scale is"


def make_compressor(size):
    import numpy as np
    from int8_feedback import Int8WithFeedback

    class Guarded(Int8WithFeedback):
        def compress(self, gradient):
            wanted = gradient + self.residual
            scale = (
                max(float(np.abs(wanted).max(initial=0.0)) / 127, 1e-12) if wanted.any() else 0.0
            )
            quantised = np.rint(wanted / (scale or 1.0)).astype(np.int8)
            self.residual = wanted - quantised * np.float32(scale)
            return quantised, scale

    return Guarded(size)
