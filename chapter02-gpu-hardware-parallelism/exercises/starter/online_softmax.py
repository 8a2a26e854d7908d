"""Task 4, online-softmax: attention over keys and values that arrive block by block."""

import numpy as np


class OnlineAttention:
    """softmax(queries @ keys.T / sqrt(head_dim)) @ values, without ever holding all keys.

    In ring attention the blocks of keys and values travel from worker to worker; each worker adds
    them to its result as they pass. For each query keep the largest score so far, the sum of
    exp(score - largest), and the values summed with these weights; when a larger score comes,
    scale down what was summed before (Milakov and Gimelshein, arXiv 1805.02867).
    """

    def __init__(self, queries: np.ndarray) -> None:
        """queries [num_queries, head_dim], float64, as all arrays here; none is changed."""
        raise NotImplementedError("online_softmax.OnlineAttention is yours to write")

    def add(self, keys: np.ndarray, values: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Take in a block: keys [block, head_dim], values [block, value_dim].

        mask [num_queries, block], where given, is True where a query may see a key. A query may
        see no key of a block, and a block may hold no key at all. What is hidden counts for
        nothing, however large its score, not even as the largest. Scores may be tens of thousands,
        of either sign: exp must neither overflow nor make all of a query's weights 0.
        """
        raise NotImplementedError("online_softmax.OnlineAttention.add is yours to write")

    def result(self) -> np.ndarray:
        """[num_queries, value_dim]: the attention over all blocks so far, of which there is one
        at least. Asking changes nothing: more blocks may follow, and the same question.

        A query that has seen no key yet gets zeros. The array is the caller's: later blocks do not
        change it, and what the caller does to it changes no later result.
        """
        raise NotImplementedError("online_softmax.OnlineAttention.result is yours to write")
