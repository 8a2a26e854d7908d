"""Task 3: whatever the blocks, the attention of keys and values in one piece."""

import numpy as np

KV_HEADS, HEAD_DIM, SIZE, BLOCKS = 2, 8, 4, 12
TOLERANCE = 1e-12  # float64; only the order of the sums differs


def sequence(length, seed=0, heads=KV_HEADS, scale=1.0):
    """Queries, keys and values of a whole sequence."""
    chance = np.random.default_rng(seed)
    queries = scale * chance.normal(size=(length, heads, HEAD_DIM))
    keys, values = chance.normal(size=(2, length, KV_HEADS, HEAD_DIM))
    return queries, keys, values


def empty_cache():
    return np.full((2, BLOCKS, SIZE, KV_HEADS, HEAD_DIM), np.nan)


def filled(keys, values, table):
    """A cache that holds them, written by the grader itself."""
    cache = empty_cache()
    for token in range(len(keys)):
        block, place = table[token // SIZE], token % SIZE
        cache[0, block, place], cache[1, block, place] = keys[token], values[token]
    return cache


def attention(queries, keys, values, start):
    """By the definition, one query and one head at a time; queries from token `start` on."""
    out = np.empty_like(queries)
    group = queries.shape[1] // KV_HEADS
    for row, query in enumerate(queries):
        seen = start + row + 1
        for head in range(queries.shape[1]):
            scores = keys[:seen, head // group] @ query[head] / np.sqrt(HEAD_DIM)
            weights = np.exp(scores - scores.max())
            out[row, head] = weights @ values[:seen, head // group] / weights.sum()
    return out


def assert_attention(student, queries, keys, values, table, start, case):
    cache = filled(keys, values, table)
    kept = cache.copy()
    with np.errstate(all="ignore"):
        got = student.paged_attention(queries[start:].copy(), cache, list(table), start)
    assert np.array_equal(cache, kept, equal_nan=True), f"{case}: attention changed the cache"
    expected = attention(queries[start:], keys, values, start)
    assert np.shape(got) == expected.shape, (
        f"{case}: the result has the shape {np.shape(got)}, expected {expected.shape}"
    )
    assert np.isfinite(got).all(), (
        f"{case}: nan or inf in the result; a place was read in which no token of the sequence is: "
        "behind the last one, or in a block that is not its turn"
    )
    worst = np.abs(got - expected).max(axis=(1, 2))
    row = int(worst.argmax())
    assert worst[row] <= TOLERANCE, (
        f"{case}: token {start + row} is {worst[row]:.2g} away from the attention over the same "
        "keys and values in one piece"
    )


def test_tokens_are_written_to_their_slots(student):
    table = [7, 0, 11, 3, 5]
    _, keys, values = sequence(14)
    for start, stop in ((0, 14), (0, 3), (5, 6), (3, 9), (8, 12)):
        cache = empty_cache()
        student.write_keys_and_values(
            cache, list(table), start, keys[start:stop], values[start:stop]
        )
        case = f"tokens {start} to {stop - 1} in blocks of {SIZE}, table {table}"
        expected = empty_cache()
        for token in range(start, stop):
            slot = (table[token // SIZE], token % SIZE)
            expected[0][slot], expected[1][slot] = keys[token], values[token]
            for part, name in enumerate(("keys", "values")):
                assert np.array_equal(cache[part][slot], expected[part][slot]), (
                    f"{case}: the {name} of token {token} are not in block {slot[0]}, place "
                    f"{slot[1]}"
                )
        assert np.array_equal(cache, expected, equal_nan=True), f"{case}: other places were written"


def test_a_decode_step(student):
    for length in (1, 4, 5, 13):
        queries, keys, values = sequence(length, seed=length)
        for table in ([0, 1, 2, 3], [9, 2, 10, 4], [11, 10, 1, 0, 6, 7]):
            assert_attention(student, queries, keys, values, table, length - 1,
                             f"the last of {length} tokens, table {table}")  # fmt: skip
    queries, keys, values = sequence(9, scale=3000.0)
    assert_attention(student, queries, keys, values, [5, 4, 3], 8, "scores of several thousand")


def test_a_chunk_of_a_prompt(student):
    for start, length in ((0, 9), (0, 8), (4, 9), (6, 7), (3, 14)):
        queries, keys, values = sequence(length, seed=10 * start)
        case = f"tokens {start} to {length - 1} of {length}, table [8, 1, 6, 2]"
        assert_attention(student, queries, keys, values, [8, 1, 6, 2], start, case)


def test_query_heads_share_key_value_heads(student):
    for heads in (4, 6):
        queries, keys, values = sequence(10, seed=heads, heads=heads)
        for start in (0, 9):
            assert_attention(student, queries, keys, values, [3, 9, 0], start,
                             f"{heads} query heads on {KV_HEADS} key-value heads, from token "
                             f"{start} on")  # fmt: skip
