"""Task 4: hashes compared with the prefixes that they stand for."""

from grader_hashing import count_hashes, hashes_elsewhere, seconds_to_hash

SIZE = 4
SIZES = (1, 2, 3, 4, 5, 7, 16)
MANY = 200_000  # a digest of 32 bits has about 5 collisions among so many
SHORTEST = {int: 112, bytes: 16, str: 20}  # bits, bytes and letters of a digest of 128 bits


def hashed(student, tokens, size=SIZE):
    handed = list(tokens)
    hashes = list(student.block_hashes(handed, size))
    assert handed == list(tokens), "block_hashes changed the tokens"
    for value in hashes:
        hash(value)  # a TypeError here: a hash must be hashable
    return hashes


def random_tokens(chance, length):
    """Of few kinds, so that prompts are alike, or of all sizes that ids may have."""
    below = int(chance.choice([2, 3, 2**32]))
    return chance.integers(0, below, length).tolist()


def test_whole_blocks_only(student, chance):
    for size in SIZES:
        for length in (0, 1, size - 1, size, size + 1, int(chance.integers(0, 60))):
            tokens = random_tokens(chance, length)
            found = len(hashed(student, tokens, size))
            assert found == length // size, (
                f"{length} tokens in blocks of {size}: {found} hashes, expected {length // size}, "
                "one for each whole block"
            )
            more = tokens + random_tokens(chance, int(chance.integers(0, 3 * size)))
            assert hashed(student, more, size)[:found] == hashed(student, tokens, size), (
                f"tokens behind the block {found - 1} of {size} changed a hash before them"
            )


def prompts_to_confuse(chance, size):
    """Prompts that weak hashes take for each other, all of four blocks."""
    length = 4 * size
    a, b, c = (random_tokens(chance, size) for _ in range(3))
    # blocks in another order, repeated, gone: sums and XORs of blocks do not see it
    blocks = [[a, b, c, c], [b, a, c, c], [a, a, c, c], [b, b, c, c], [c, c, c, c], [c, a, b, c]]
    yield from (sum(four, []) for four in blocks)
    # tokens in another order; digits that run together; bytes that are cut off
    for token in (0, 1, 11, 256, 257, 2**16, 2**16 + 1, 2**31 - 1, 2**31 - 2, 2**32 - 1):
        yield [token] * length
        yield [token, *[1] * (length - 1)]
        yield [*[1] * (length - 1), token]
    for begin in ([1, 23], [12, 3], [1, 2, 34], [1, 23, 4]):
        yield [*begin, *[4] * (length - len(begin))]
    for _ in range(20):
        yield random_tokens(chance, length)


def test_a_hash_stands_for_all_tokens_before_it(student, chance):
    for size in (1, 2, SIZE, int(chance.integers(5, 12))):
        prefix_of, hash_of = {}, {}
        for prompt in prompts_to_confuse(chance, size):
            for place, value in enumerate(hashed(student, prompt, size)):
                prefix = tuple(prompt[: (place + 1) * size])
                seen = prefix_of.setdefault(value, prefix)
                assert seen == prefix, (
                    f"blocks of {size}: the hash of block {place} of {list(prefix)} is that of the "
                    f"last block of {list(seen)}: a sequence would be given the keys and values of "
                    "another prefix"
                )
                assert hash_of.setdefault(prefix, value) == value, (
                    f"blocks of {size}: the prefix {list(prefix)} has two hashes: nobody finds it"
                )
        for kind, least in SHORTEST.items():
            lengths = [
                value.bit_length() if kind is int else len(value)
                for value in prefix_of
                if isinstance(value, kind)
            ]
            assert not lengths or max(lengths) >= least, (
                f"the longest hash is {kind.__name__} of length {max(lengths)}: expected a digest "
                "of at least 128 bits"
            )
    tokens = random_tokens(chance, 12)
    again = hashes_elsewhere(student, tokens, 3)
    assert again == repr(hashed(student, tokens, 3)), (
        "another Python process gives other hashes of the same tokens; do not use what depends on "
        "PYTHONHASHSEED, nor on the addresses of objects"
    )
    taken = seconds_to_hash(student, MANY, 16)
    assert taken < 10, f"200,000 tokens took {taken:.0f} s: hash each block with the one before it"
    tokens = chance.integers(0, 2**32, MANY).tolist()
    count, different = count_hashes(student, tokens, 1)
    assert count == different == MANY, (
        f"{MANY:,} tokens in blocks of one: {count:,} hashes, {different:,} different ones"
    )


def assert_blocks(student, tokens, cached, expected, case, size=SIZE):
    handed, known = list(tokens), dict(cached)
    got = list(student.cached_blocks(handed, size, known))
    assert handed == list(tokens) and known == dict(cached), (
        f"{case}: cached_blocks changed the tokens, or what is cached"
    )
    assert got == expected, f"{case}: expected the blocks {expected}, got {got}"


def assert_random_blocks(student, chance, whole):
    """Cached are some blocks of a prompt and of its relatives; `whole`: no token is behind them."""
    size = int(chance.choice(SIZES))
    prompt = random_tokens(chance, size * int(chance.integers(1, 7)))
    relatives = [prompt]
    for _ in range(4):
        kept = int(chance.integers(len(prompt) + 1))
        relatives.append(prompt[:kept] + random_tokens(chance, len(prompt) - kept))
    kept_share = chance.choice([0.5, 0.9, 1.0])
    cached = {}
    for one in relatives:
        for value in hashed(student, one, size):
            if chance.random() < kept_share:
                cached[value] = int(chance.integers(0, 40))
    tokens = relatives[chance.integers(len(relatives))]
    tokens = tokens if whole else tokens + random_tokens(chance, int(chance.integers(1, size + 1)))
    expected = []
    for value in hashed(student, tokens, size)[: (len(tokens) - 1) // size]:
        if value not in cached:
            break
        expected.append(cached[value])
    assert_blocks(student, tokens, cached, expected,
                  f"{len(tokens)} tokens in blocks of {size}, of which "
                  f"{sum(v in cached for v in hashed(student, tokens, size))} are cached, "
                  "and one token at least is left to compute", size)  # fmt: skip


def test_the_longest_cached_prefix(student, chance):
    tokens = list(range(100, 122))  # five whole blocks and two tokens
    numbers = dict(zip(hashed(student, tokens), (30, 31, 7, 33, 2), strict=True))
    assert_blocks(student, tokens, {}, [], "an empty cache")
    assert_blocks(
        student, tokens, numbers, [30, 31, 7, 33, 2], "22 tokens, all whole blocks cached"
    )
    assert_blocks(student, [*tokens[:13], 0, *tokens[14:]], numbers, [30, 31, 7],
                  "the fourth block differs, the fifth is the same")  # fmt: skip
    gap = {value: block for value, block in numbers.items() if block != 31}
    assert_blocks(student, tokens, gap, [30], "the second block was evicted, later ones were not")
    assert_blocks(student, [1, *tokens[1:]], numbers, [], "the first token differs")
    assert_blocks(student, tokens[4:], numbers, [], "the same blocks, one place further ahead")
    zero = {value: 0 for value in list(numbers)[:1]}
    assert_blocks(student, tokens, zero, [0], "the first block is in block number 0")
    for _ in range(60):
        assert_random_blocks(student, chance, whole=False)


def test_something_is_left_to_compute(student, chance):
    tokens = list(range(12))
    numbers = dict(zip(hashed(student, tokens), (5, 6, 7), strict=True))
    case = "12 tokens, all three blocks cached: the last one is left to compute"
    assert_blocks(student, tokens, numbers, [5, 6], case)
    assert_blocks(student, [*tokens, 99], numbers, [5, 6, 7], "13 tokens, three blocks cached")
    assert_blocks(student, tokens[:4], numbers, [], "4 tokens, their only block cached")
    assert_blocks(student, tokens[:5], numbers, [5], "5 tokens, one whole block, cached")
    assert_blocks(student, tokens[:3], numbers, [], "3 tokens, no whole block")
    assert_blocks(student, [], numbers, [], "no token")
    for _ in range(60):
        assert_random_blocks(student, chance, whole=True)
