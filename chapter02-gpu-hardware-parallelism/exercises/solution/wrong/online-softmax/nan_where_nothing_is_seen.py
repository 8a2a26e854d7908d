"""Subtracts a maximum of -inf from scores of -inf."""

SAYS = "nan or inf"


def make_online_attention(queries):
    import numpy as np

    class Naive:
        largest, weights, summed = -np.inf, 0.0, 0.0

        def add(self, keys, values, mask=None):
            scores = queries @ keys.T / np.sqrt(queries.shape[1])
            scores = scores if mask is None else np.where(mask, scores, -np.inf)
            top = scores.max(axis=1, keepdims=True, initial=-np.inf)
            largest = np.maximum(self.largest, top)
            before, new = np.exp(self.largest - largest), np.exp(scores - largest)
            self.weights = self.weights * before + new.sum(axis=1, keepdims=True)
            self.summed = self.summed * before + new @ values
            self.largest = largest

        def result(self):
            return self.summed / self.weights

    return Naive()
