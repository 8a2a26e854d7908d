"""Task 3, int8-feedback: the reference solution."""

import numpy as np


class Int8WithFeedback:
    def __init__(self, size):
        self.residual = np.zeros(size, dtype=np.float32)

    def compress(self, gradient):
        wanted = gradient + self.residual
        scale = float(np.abs(wanted).max(initial=0.0)) / 127
        steps = wanted / scale if scale else np.zeros_like(wanted)
        quantised = np.clip(np.rint(steps), -127, 127).astype(np.int8)
        self.residual = wanted - quantised * np.float32(scale)
        return quantised, scale
