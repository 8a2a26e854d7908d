"""Adds each new rest to the old one, which was sent already."""

SAYS = "what cannot be sent now must be sent later"


def make_compressor(size):
    from int8_feedback import Int8WithFeedback

    class Hoarding(Int8WithFeedback):
        def compress(self, gradient):
            before = self.residual
            message = super().compress(gradient)
            self.residual = before + self.residual
            return message

    return Hoarding(size)
