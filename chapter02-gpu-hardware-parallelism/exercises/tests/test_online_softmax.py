"""Task 4: blocks that pass by give the attention of all keys at once."""

import math
import warnings

import numpy as np
from grader_memory import bytes_held

QUERIES, KEYS, HEAD_DIM, VALUE_DIM = 7, 24, 8, 5
TOLERANCE = 1e-12  # float64; only the order of the sums differs
RANDOM_CASES = 8


def test_one_block(student, chance):
    queries, keys, values = problem(chance, QUERIES, KEYS, HEAD_DIM, VALUE_DIM)
    check(student, queries, keys, values, [KEYS], "one block of all keys")
    for _ in range(RANDOM_CASES):
        num_queries, num_keys, head_dim, value_dim = (int(n) for n in chance.integers(1, 12, 4))
        drawn = problem(chance, num_queries, num_keys, head_dim, value_dim)
        check(student, *drawn, [num_keys], "one drawn block")
    # a mean of equal values is that value, whatever the weights
    check(student, queries, keys, np.full((KEYS, 1), 3.5), [KEYS], "all values are 3.5")


def test_blocks_in_any_order(student, chance):
    queries, keys, values = problem(chance, QUERIES, KEYS, HEAD_DIM, VALUE_DIM, scale=3.0)
    for size in (1, 5, 12):
        sizes = [size] * (KEYS // size) + [KEYS % size] * (KEYS % size > 0)
        check(student, queries, keys, values, sizes, f"blocks of {size} keys")
        check(
            student,
            queries,
            keys[::-1].copy(),
            values[::-1].copy(),
            sizes[::-1],
            f"blocks of {size} keys, the last one first",
        )
    for _ in range(RANDOM_CASES):
        drawn = problem(chance, *(int(n) for n in chance.integers(1, 14, 4)), scale=3.0)
        check(student, *drawn, drawn_sizes(chance, len(drawn[1])), "drawn blocks")
    check_two_at_once(student, chance)
    held = bytes_held(student, blocks=100, block=64, dim=32)
    most = 100 * 64 * 32 * 8 // 4
    assert held < most, (
        f"after 100 blocks of 64 keys and values of 32 numbers, 3.3 MB in all, {held:,} bytes more "
        "are held than before: add them to the sums, and let them go"
    )


def test_large_scores(student, chance):
    for base, spread in ((0, 3000), (-4000, 300), (4000, 300), (-30_000, 0)):
        for head_dim in (1, 4, 16):
            queries, keys, values = large_problem(chance, base, spread, head_dim)
            name = f"scores around {base}, give or take {spread}"
            check(student, queries, keys, values, drawn_sizes(chance, len(keys)), name)
            rising = np.argsort(keys[:, 0])
            for order, direction in ((rising, "rising"), (rising[::-1], "falling")):
                case = f"{name}, {direction}"
                check(student, queries, keys[order], values[order], [1] * len(keys), case)


def test_masked_blocks(student, chance):
    queries, keys, values = problem(chance, QUERIES, KEYS, HEAD_DIM, VALUE_DIM)
    positions = np.array([-1, 0, 3, 8, 9, 17, 23])  # the last key that each query may see
    mask = np.arange(KEYS)[None, :] <= positions[:, None]
    for name, sizes, order in (
        ("causal, in order", [8, 8, 8], slice(None)),
        ("causal, the last block first", [8, 8, 8], slice(None, None, -1)),
        ("causal, an empty block among them", [8, 0, 16], slice(None)),
        ("causal, an empty block at first", [0, 8, 16], slice(None)),
    ):
        arrays = keys[order].copy(), values[order].copy()
        check(student, queries, *arrays, sizes, name, mask[:, order].copy())
    check(student, queries, keys[:0], values[:0], [0], "no key at all")
    for _ in range(RANDOM_CASES):
        drawn = problem(chance, *(int(n) for n in chance.integers(1, 14, 4)), scale=2.0)
        mask = chance.random((len(drawn[0]), len(drawn[1]))) < chance.choice([0.1, 0.5, 0.9])
        check(student, *drawn, drawn_sizes(chance, len(drawn[1])), "a drawn mask", mask)
        hidden = drawn[1] * np.where(mask.any(axis=0), 1, 4000)[:, None]  # seen by no query
        check(student, drawn[0], hidden, drawn[2], [len(hidden)], "huge keys, all hidden", mask)
        low = large_problem(chance, -4000, 300, 4)
        mask = chance.random((len(low[0]), len(low[1]))) < 0.3
        check(student, *low, [1] * len(low[1]), "scores around -4000, a drawn mask", mask)
    # a hidden key's score must not count for the maximum either
    one = np.array([[1.0]])
    check(
        student,
        one,
        np.array([[3000.0], [1.0], [2.0]]),
        np.array([[9.0], [1.0], [2.0]]),
        [1, 2],
        "a hidden score of 3000, then scores of 1 and 2",
        np.array([[False, True, True]]),
    )
    check(
        student,
        one,
        np.array([[1.0], [3000.0], [2.0]]),
        np.array([[1.0], [9.0], [2.0]]),
        [3],
        "a hidden score of 3000 among scores of 1 and 2",
        np.array([[True, False, True]]),
    )


def check_two_at_once(student, chance):
    """Two workers' attentions in one process know nothing of each other."""
    problems = [problem(chance, 3, 6, 4, 2) for _ in range(2)]
    both = [student.make_online_attention(queries) for queries, _, _ in problems]
    for block in (slice(0, 2), slice(2, 6)):
        for online, (_, keys, values) in zip(both, problems, strict=True):
            online.add(keys[block], values[block])
    for online, (queries, keys, values) in zip(both, problems, strict=True):
        expected = attention(queries, keys, values)
        assert_close(online.result(), expected, "two attentions, block by block in turn")


def problem(chance, num_queries, num_keys, head_dim, value_dim, scale=1.0):
    queries = scale * chance.normal(size=(num_queries, head_dim))
    keys = chance.normal(size=(num_keys, head_dim))
    return queries, keys, chance.normal(size=(num_keys, value_dim))


def large_problem(chance, base, spread, head_dim):
    """Whole numbers, and a head dimension with a whole root: scores are exact in any order."""
    num_queries, num_keys = (int(n) for n in chance.integers(2, 14, 2))
    queries = np.zeros((num_queries, head_dim))
    queries[:, 0] = head_dim**0.5 * (base + chance.integers(-spread, spread + 1, num_queries))
    keys = chance.integers(-3, 4, (num_keys, head_dim)).astype(float)
    keys[:, 0] = 1 + chance.integers(0, 2, num_keys)
    return queries, keys, chance.normal(size=(num_keys, VALUE_DIM))


def drawn_sizes(chance, num_keys):
    """Sizes of blocks that hold all keys; 0 and 1 among them."""
    cuts = np.sort(chance.integers(0, num_keys + 1, int(chance.integers(0, 6))))
    return np.diff([0, *cuts, num_keys]).tolist()


def check(student, queries, keys, values, sizes, name, mask=None):
    """Add blocks of these sizes; after some of them the result is that of the keys so far."""
    online = student.make_online_attention(queries.copy())
    case = (
        f"{name}: queries {queries.shape}, keys {keys.shape}, values {values.shape}, blocks of "
        f"{sizes} keys, {'no mask' if mask is None else 'a mask'}"
    )
    end, told = 0, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, size in enumerate(sizes):
            block, end = slice(end, end + size), end + size
            given = [keys[block].copy(), values[block].copy()]
            given += [] if mask is None else [mask[:, block].copy()]
            kept = [array.copy() for array in given]
            online.add(*given)
            unchanged = all(np.array_equal(a, b) for a, b in zip(given, kept, strict=True))
            assert unchanged, f"{case}: add changes the arrays that it is given"
            if number % 2 == 0 or end == len(keys):
                seen = None if mask is None else mask[:, :end]
                expected = attention(queries, keys[:end], values[:end], seen)
                got = online.result()
                assert_close(got, expected, f"{case}; after {end} keys")
                assert_close(online.result(), expected, f"{case}; result() called once more")
                got -= 1
                told.append((got, got.copy()))
        assert_close(online.result(), expected, f"{case}; the caller has changed the last result")
        for earlier, kept in told:
            assert np.array_equal(earlier, kept), f"{case}: a later call changes an earlier result"


def attention(queries, keys, values, mask=None):
    """Query by query, over its visible keys, with sums that are rounded once; else zeros."""
    result = np.zeros((len(queries), values.shape[1]))
    for q, query in enumerate(queries):
        visible = [k for k in range(len(keys)) if mask is None or mask[q, k]]
        scores = {k: float(query @ keys[k]) / math.sqrt(len(query)) for k in visible}
        top = max(scores.values(), default=0.0)
        weights = {k: math.exp(score - top) for k, score in scores.items()}
        total = math.fsum(weights.values())
        for column in range(values.shape[1] if visible else 0):
            summed = math.fsum(weight * values[k, column] for k, weight in weights.items())
            result[q, column] = summed / total
    return result


def assert_close(got, expected, case):
    assert np.shape(got) == expected.shape, (
        f"{case}: the result has the shape {np.shape(got)}, expected {expected.shape}"
    )
    assert np.isfinite(got).all(), f"{case}: the result has nan or inf in it"
    differences = np.abs(got - expected)
    worst = differences.max(initial=0.0)
    query = int(differences.max(axis=1).argmax()) if differences.size else 0
    assert worst <= TOLERANCE, (
        f"{case}: differs from the attention over all keys by {worst:.2g}; query {query} gets "
        f"{np.round(got[query], 3).tolist()}, expected {np.round(expected[query], 3).tolist()}"
    )
