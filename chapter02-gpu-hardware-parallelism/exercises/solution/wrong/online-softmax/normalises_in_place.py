"""Divides what it has summed in place, so that asking changes the answer."""

import numpy as np

SAYS = "differs from the attention over all keys"


def make_online_attention(queries):
    from online_softmax import OnlineAttention

    class InPlace(OnlineAttention):
        def result(self):
            self.summed = self.summed / np.where(self.weights > 0, self.weights, 1.0)
            return self.summed

    return InPlace(queries)
