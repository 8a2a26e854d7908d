"""Keeps the residual with the class, so that every bucket adds to the others'."""

SAYS = "and the largest magnitude / 127 is"
LEFT = {}


def make_compressor(size):
    from int8_feedback import Int8WithFeedback

    class Sharing(Int8WithFeedback):
        def compress(self, gradient):
            self.residual = LEFT.get(size, self.residual)
            message = super().compress(gradient)
            LEFT[size] = self.residual
            return message

    return Sharing(size)
