"""Starts the largest score at 0: weights of scores far below it vanish."""

import numpy as np

SAYS = "scores around 0, give or take 3000"


def make_online_attention(queries):
    from online_softmax import OnlineAttention

    class FromZero(OnlineAttention):
        def __init__(self, queries):
            super().__init__(queries)
            self.largest = np.zeros((len(queries), 1))

    return FromZero(queries)
