"""Sums plain exponentials, which overflow."""

SAYS = "nan or inf"


def make_online_attention(queries):
    import numpy as np

    class Plain:
        weights = summed = 0.0

        def add(self, keys, values, mask=None):
            weights = np.exp(queries @ keys.T / np.sqrt(queries.shape[1]))
            weights = weights if mask is None else weights * mask
            self.weights = self.weights + weights.sum(axis=1, keepdims=True)
            self.summed = self.summed + weights @ values

        def result(self):
            return self.summed / np.where(self.weights > 0, self.weights, 1.0)

    return Plain()
