"""Hides weights only after the largest score is taken, hidden keys' too."""

import numpy as np

SAYS = "all hidden"


def make_online_attention(queries):
    from online_softmax import OnlineAttention

    class Raised(OnlineAttention):
        def add(self, keys, values, mask=None):
            scores = self.queries @ keys.T / np.sqrt(self.queries.shape[1])
            top = np.maximum(self.largest, scores.max(axis=1, keepdims=True, initial=-np.inf))
            before = np.exp(self.largest - np.where(np.isfinite(top), top, 0.0))
            new = np.exp(scores - top) * (1.0 if mask is None else mask)
            self.weights = self.weights * before + new.sum(axis=1, keepdims=True)
            self.summed, self.largest = self.summed * before + new @ values, top

    return Raised(queries)
