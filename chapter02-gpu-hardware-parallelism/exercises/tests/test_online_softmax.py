"""Task 4: blocks that pass by give the attention of all keys at once."""

import warnings

import numpy as np

QUERIES, KEYS, HEAD_DIM, VALUE_DIM = 7, 24, 8, 5
TOLERANCE = 1e-12  # float64; only the order of the sums differs


def problem(scale=1.0):
    generator = np.random.default_rng(3)
    queries = scale * generator.normal(size=(QUERIES, HEAD_DIM))
    keys = generator.normal(size=(KEYS, HEAD_DIM))
    return queries, keys, generator.normal(size=(KEYS, VALUE_DIM))


def attention(queries, keys, values, mask=None):
    """All at once; zeros for a query that sees no key."""
    scores = queries @ keys.T / np.sqrt(queries.shape[1])
    scores = scores if mask is None else np.where(mask, scores, -np.inf)
    top = scores.max(axis=1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0.0))
    total = weights.sum(axis=1, keepdims=True)
    return weights @ values / np.where(total > 0, total, 1.0)


def blockwise(student, queries, keys, values, blocks, mask=None):
    online = student.make_online_attention(queries.copy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in blocks:
            seen = None if mask is None else mask[:, block]
            online.add(keys[block], values[block], seen)
        return online.result()


def assert_close(got, expected, case):
    assert np.shape(got) == expected.shape, (
        f"{case}: the result has the shape {np.shape(got)}, expected {expected.shape}"
    )
    assert np.isfinite(got).all(), f"{case}: the result has nan or inf in it"
    worst = np.abs(got - expected).max()
    assert worst <= TOLERANCE, f"{case}: differs from the attention over all keys by {worst:.2g}"


def test_one_block(student):
    queries, keys, values = problem()
    got = blockwise(student, queries, keys, values, [slice(0, KEYS)])
    assert_close(got, attention(queries, keys, values), "one block of all keys")


def test_blocks_in_any_order(student):
    queries, keys, values = problem(scale=3.0)
    expected = attention(queries, keys, values)
    for size in (1, 5, 12):
        blocks = [slice(i, i + size) for i in range(0, KEYS, size)]
        got = blockwise(student, queries, keys, values, blocks)
        assert_close(got, expected, f"blocks of {size} keys")
        got = blockwise(student, queries, keys, values, blocks[::-1])
        assert_close(got, expected, f"blocks of {size} keys, the last one first")


def test_large_scores(student):
    queries, keys, values = problem(scale=1000.0)
    blocks = [slice(i, i + 6) for i in range(0, KEYS, 6)]
    got = blockwise(student, queries, keys, values, blocks)
    assert_close(got, attention(queries, keys, values), "scores of several thousand")


def test_masked_blocks(student):
    queries, keys, values = problem()
    positions = np.array([-1, 0, 3, 8, 9, 17, 23])  # the last key that each query may see
    mask = np.arange(KEYS)[None, :] <= positions[:, None]
    expected = attention(queries, keys, values, mask)
    for name, blocks in {
        "causal, in order": [slice(0, 8), slice(8, 16), slice(16, 24)],
        "causal, the last block first": [slice(16, 24), slice(8, 16), slice(0, 8)],
        "causal, an empty block among them": [slice(0, 8), slice(8, 8), slice(8, 24)],
    }.items():
        got = blockwise(student, queries, keys, values, blocks, mask)
        assert_close(got, expected, name)
