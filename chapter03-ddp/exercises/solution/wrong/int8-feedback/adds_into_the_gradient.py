"""Adds what was left over into the caller's gradient."""

SAYS = "compress changed the gradient"


def make_compressor(size):
    from int8_feedback import Int8WithFeedback

    class InPlace(Int8WithFeedback):
        def compress(self, gradient):
            gradient += self.residual
            self.residual = 0 * self.residual
            return super().compress(gradient)

    return InPlace(size)
