"""Task 3: whatever the blocks, the attention of keys and values in one piece."""

from dataclasses import dataclass

import numpy as np

# of values of about 1; what float16 loses is the rounding of the result
TOLERANCE = {np.dtype(np.float64): 1e-9, np.dtype(np.float32): 1e-4, np.dtype(np.float16): 2e-3}


@dataclass
class Case:
    """A sequence, and a cache of which most is other people's: garbage of one kind."""

    queries: np.ndarray  # [tokens, heads, head_dim]
    keys: np.ndarray  # [tokens, kv_heads, head_dim]
    values: np.ndarray
    table: list
    size: int
    blocks: int
    garbage: float
    cache_dtype: np.dtype

    def __str__(self):
        tokens, heads, head_dim = self.queries.shape
        return (
            f"{tokens} tokens of {self.queries.dtype}, {heads} query heads on "
            f"{self.keys.shape[1]} key-value heads of {head_dim}, blocks of {self.size} "
            f"{self.cache_dtype}, table {self.table}"
        )

    def empty_cache(self):
        shape = (2, self.blocks, self.size, *self.keys.shape[1:])
        return np.full(shape, self.garbage, dtype=self.cache_dtype)

    def filled(self):
        """A cache that holds the sequence, written by the grader itself."""
        cache = self.empty_cache()
        for token in range(len(self.keys)):
            block, place = self.table[token // self.size], token % self.size
            cache[0, block, place] = self.keys[token]
            cache[1, block, place] = self.values[token]
        return cache


def random_case(chance, length, kv_heads=2, group=1, scale=1.0, dtype=np.float64):
    size, head_dim = int(chance.choice([1, 2, 3, 4, 5, 16])), int(chance.choice([1, 3, 8, 20]))
    needed = -(-length // size)
    blocks = needed + int(chance.integers(2, 9))
    named = needed + int(chance.integers(0, 3))  # the table may name more than are needed
    queries = scale * chance.normal(size=(length, kv_heads * group, head_dim))
    keys, values = chance.normal(size=(2, length, kv_heads, head_dim))
    return Case(
        queries.astype(dtype), keys.astype(dtype), values.astype(dtype),
        chance.permutation(blocks)[:named].tolist(), size, blocks,
        float(chance.choice([np.nan, np.inf, -np.inf, 7.0, 0.0])), np.dtype(dtype),
    )  # fmt: skip


def with_another_cache(case, chance):
    """The case with a cache of any float type, and keys and values that are exact in it."""
    case.cache_dtype = np.dtype(chance.choice([np.float16, np.float32, np.float64]))
    case.keys, case.values = (
        array.astype(case.cache_dtype).astype(array.dtype) for array in (case.keys, case.values)
    )
    return case


def attention(case, start):
    """By the definition, one query and one head at a time, in float64."""
    queries, keys, values = (
        array.astype(np.float64) for array in (case.queries, case.keys, case.values)
    )
    out = np.empty_like(queries[start:])
    group = queries.shape[1] // keys.shape[1]
    for row in range(len(out)):
        for head in range(queries.shape[1]):
            seen = slice(0, start + row + 1)
            scores = keys[seen, head // group] @ queries[start + row, head]
            scores = scores / np.sqrt(queries.shape[2])
            weights = np.exp(scores - scores.max())
            out[row, head] = weights @ values[seen, head // group] / weights.sum()
    return out


def assert_attention(student, case, start, why):
    cache, queries, table = case.filled(), case.queries[start:].copy(), list(case.table)
    kept = cache.copy()
    with np.errstate(all="ignore"):
        got = student.paged_attention(queries, cache, table, start)
    why = f"{why}: tokens {start} to {len(case.keys) - 1} of {case}"
    assert np.array_equal(cache, kept, equal_nan=True), f"{why}: attention changed the cache"
    assert np.array_equal(queries, case.queries[start:]), f"{why}: attention changed the queries"
    assert table == case.table, f"{why}: attention changed the table"
    expected = attention(case, start)
    assert np.shape(got) == expected.shape, (
        f"{why}: the result has the shape {np.shape(got)}, expected {expected.shape}"
    )
    assert got.dtype == case.queries.dtype, f"{why}: the result is {got.dtype}"
    assert np.isfinite(got).all(), (
        f"{why}: nan or inf in the result; a place was read in which no token of the sequence is "
        "(behind the last one, or in a block that is not its turn), or an exponential over- or "
        "underflowed"
    )
    worst = np.abs(got.astype(np.float64) - expected).max(axis=(1, 2))
    row = int(worst.argmax())
    assert worst[row] <= TOLERANCE[got.dtype], (
        f"{why}: token {start + row} is {worst[row]:.2g} away from the attention over the same "
        "keys and values in one piece"
    )


def test_tokens_are_written_to_their_slots(student, chance):
    for number in range(40):
        case = random_case(chance, int(chance.integers(1, 40)), kv_heads=int(chance.integers(1, 4)))
        if number % 4 == 0:
            case.cache_dtype = np.dtype(np.float16)  # the values are rounded as they are stored
        start, stop = sorted(chance.integers(0, len(case.keys) + 1, 2).tolist())
        cache, table = case.empty_cache(), list(case.table)
        keys, values = case.keys[start:stop].copy(), case.values[start:stop].copy()
        student.write_keys_and_values(cache, table, start, keys, values)
        shown = f"tokens {start} to {stop - 1} of {case}"
        expected = case.empty_cache()
        for token in range(start, stop):
            slot = (case.table[token // case.size], token % case.size)
            expected[0][slot], expected[1][slot] = case.keys[token], case.values[token]
            for part, name in enumerate(("keys", "values")):
                assert np.array_equal(cache[part][slot], expected[part][slot]), (
                    f"{shown}: the {name} of token {token} are not in block {slot[0]}, place "
                    f"{slot[1]}"
                )
        assert np.array_equal(cache, expected, equal_nan=True), (
            f"{shown}: other places were written"
        )
        same = np.array_equal(keys, case.keys[start:stop])
        same &= np.array_equal(values, case.values[start:stop])
        assert same and table == case.table, f"{shown}: keys, values or the table were changed"


def test_a_decode_step(student, chance):
    for number in range(40):
        length = int(chance.choice([1, 2, 4, 5, 16, 17, int(chance.integers(1, 60))]))
        dtype = [np.float64, np.float64, np.float32, np.float16][number % 4]
        # scores of 100 would be coarse in float16
        length, scale = (length + 20, 30.0) if dtype == np.float16 else (length, 1.0)
        case = random_case(chance, length, dtype=dtype, scale=scale)
        assert_attention(student, case, length - 1, "a decode step")
        case = with_another_cache(case, chance)
        assert_attention(student, case, length - 1, "a decode step with another cache")
    for sign in (1, -1):
        case = random_case(chance, int(chance.integers(5, 20)), scale=3000.0)
        assert_attention(student, case, len(case.keys) - 1, "scores of several thousand")
        case = random_case(chance, int(chance.integers(5, 20)))
        case.keys += 40
        case.queries += sign * 1000
        assert_attention(student, case, len(case.keys) - 1, "scores of one sign, far from 0")


def test_a_chunk_of_a_prompt(student, chance):
    for number in range(30):
        length = int(chance.choice([2, 8, 9, int(chance.integers(2, 40))]))
        start = 0 if number % 3 == 0 else int(chance.integers(0, length))
        case = random_case(chance, length, dtype=[np.float64, np.float32][number % 2])
        assert_attention(student, case, start, "a chunk of a prompt")


def test_query_heads_share_key_value_heads(student, chance):
    for number in range(30):
        length = int(chance.integers(1, 20))
        case = random_case(
            chance, length, kv_heads=int(chance.choice([1, 2, 3, 5])), group=2 + number % 3
        )
        start = length - 1 if number % 2 else int(chance.integers(0, length))
        assert_attention(student, case, start, "grouped heads")
