"""Divides the scores by the root of the values' width, not of the keys'."""

import numpy as np

SAYS = "differs from the attention over all keys"


def make_online_attention(queries):
    from online_softmax import OnlineAttention

    class Width(OnlineAttention):
        def add(self, keys, values, mask=None):
            ratio = np.sqrt(keys.shape[1] / values.shape[1])
            super().add(keys * ratio, values, mask)

    return Width(queries)
