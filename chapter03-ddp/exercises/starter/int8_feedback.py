"""Task 3, int8-feedback: a quarter of the bytes, and nothing lost for good."""

import numpy as np


class Int8WithFeedback:
    """One worker's compressor of one bucket: it remembers what it could not send.

    What is to be sent is the gradient and what was left over from the last time. It is rounded to
    the nearest multiple of `scale`; the rest becomes the new `residual` (error feedback: Seide et
    al., INTERSPEECH 2014, "1-Bit Stochastic Gradient Descent"; Karimireddy et al., arXiv
    1901.09847).
    """

    def __init__(self, size: int) -> None:
        """`residual`, float32 [size], is an attribute, and zero at first. `size` may be 0."""
        raise NotImplementedError("int8_feedback.Int8WithFeedback is yours to write")

    def compress(self, gradient: np.ndarray) -> tuple[np.ndarray, float]:
        """(quantised, scale) of a float32 gradient [size]; the receiver multiplies the two.

        quantised is int8 [size], within -127 to 127; scale is the smallest with which that is
        enough, a float of Python: the largest magnitude to be sent, gradient and residual together,
        divided by 127. Half-way between two steps either is the nearest. Where there is nothing to
        be sent but zeros, quantised is zero and scale is 0.0; while a residual is left there is.

        `gradient` is not changed, and its memory may be another gradient's at the next call. A
        message stays as it is when the next one is made.
        """
        raise NotImplementedError("int8_feedback.Int8WithFeedback.compress is yours to write")
