"""Task 3, paged-attention: keys and values that lie in blocks anywhere in the cache."""

from collections.abc import Sequence

import numpy as np


def write(
    cache: np.ndarray, table: Sequence[int], start: int, keys: np.ndarray, values: np.ndarray
) -> None:
    """Store keys and values [tokens, kv_heads, head_dim] of the tokens `start`, start + 1, …

    cache [2, num_blocks, block_size, kv_heads, head_dim], changed in place: keys in cache[0],
    values in cache[1]. Token t of the sequence lies in block table[t // block_size], at the place
    t % block_size. The table may name more blocks than are needed, and there may be no token.
    The cache may be of another float type than keys and values. All other places of it, and the
    other arguments, stay as they are.
    """
    raise NotImplementedError("paged_attention.write is yours to write")


def attend(queries: np.ndarray, cache: np.ndarray, table: Sequence[int], start: int) -> np.ndarray:
    """Causal attention [tokens, heads, head_dim] of the tokens `start`, start + 1, …

    queries [tokens, heads, head_dim]; keys and values of these tokens and of all before them are in
    the cache. A token sees those before it and itself. The scores are divided by sqrt(head_dim).

    heads is a multiple of kv_heads: with g = heads / kv_heads the query heads 0 to g - 1 share
    key-value head 0, the next g share head 1, and so on (Ainslie et al., arXiv 2305.13245).
    What lies in a block behind the last token, or in blocks of other sequences, may be anything,
    nan and inf included. All scores may be several thousand, or minus several thousand.

    The result has the queries' dtype (float16, float32 or float64), and the cache may have another
    of these; the sums and exponentials are made in the wider of the two, and of float16 in float32
    at least. There is one token or more, and no argument is changed.
    Source: Kwon et al., "PagedAttention", SOSP 2023, section 4.1.
    """
    raise NotImplementedError("paged_attention.attend is yours to write")
