"""Takes the scale from the gradient and cuts off what is larger together with the residual."""

SAYS = "with what was left over before"


def make_compressor(size):
    import numpy as np
    from int8_feedback import Int8WithFeedback

    class Clipping(Int8WithFeedback):
        def compress(self, gradient):
            scale = float(np.abs(gradient).max(initial=0.0)) / 127
            if not scale:
                return super().compress(gradient)
            wanted = gradient + self.residual
            quantised = np.clip(np.rint(wanted / scale), -127, 127).astype(np.int8)
            self.residual = wanted - quantised * np.float32(scale)
            return quantised, scale

    return Clipping(size)
