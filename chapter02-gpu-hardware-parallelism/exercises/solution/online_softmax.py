"""Task 4, online-softmax: the reference solution."""

import numpy as np


class OnlineAttention:
    def __init__(self, queries):
        self.queries = queries
        self.largest = np.full((len(queries), 1), -np.inf)
        self.weights = np.zeros((len(queries), 1))
        self.summed = np.zeros((len(queries), 1))  # grows to the values' width when it is added to

    def add(self, keys, values, mask=None):
        scores = self.queries @ keys.T / np.sqrt(self.queries.shape[1])
        if mask is not None:
            scores = np.where(mask, scores, -np.inf)
        largest = np.maximum(self.largest, scores.max(axis=1, keepdims=True, initial=-np.inf))
        # a query that has seen nothing has -inf here, and -inf - -inf is nan
        finite = np.where(np.isfinite(largest), largest, 0.0)
        before = np.exp(self.largest - finite)
        new = np.exp(scores - finite)
        self.weights = self.weights * before + new.sum(axis=1, keepdims=True)
        self.summed = self.summed * before + new @ values
        self.largest = largest

    def result(self):
        return self.summed / np.where(self.weights > 0, self.weights, 1.0)
