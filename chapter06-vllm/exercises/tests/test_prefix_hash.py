"""Task 4: hashes compared with the prefixes that they stand for."""

import random

from grader_hashing import hashes_elsewhere, seconds_to_hash

SIZE = 4


def hashed(student, tokens, size=SIZE):
    hashes = list(student.block_hashes(list(tokens), size))
    for value in hashes:
        hash(value)  # a TypeError here: a hash must be hashable
    return hashes


def test_whole_blocks_only(student):
    for length in (0, 1, 3, 4, 5, 8, 21):
        found = len(hashed(student, range(length)))
        assert found == length // SIZE, (
            f"{length} tokens in blocks of {SIZE}: {found} hashes, expected {length // SIZE}, one "
            "for each whole block"
        )
    assert hashed(student, range(9)) == hashed(student, range(11)), (
        "tokens behind the last whole block changed a hash before them"
    )
    assert len(hashed(student, range(9), 1)) == 9, "blocks of one token: expected 9 hashes of 9"


def test_a_hash_stands_for_all_tokens_before_it(student):
    prompts = [[chance.randrange(3) for _ in range(16)]
               for chance in map(random.Random, range(60))]  # fmt: skip
    prompts += [list(range(16)), [0, 1, 2, 3] * 4, [9, 9, 9, 9, *range(4, 16)],
                [1] * 16, [2**32 - 1] * 16, [2**31 - 1] * 16, [2**16] * 16, [0] * 16,
                [11, 1, 1, 1] * 4, [1, 11, 1, 1] * 4, [256, 1, 0, 0] * 4,
                [0, 0, 1, 256] * 4, [1, 0, 0, 256] * 4]  # fmt: skip
    # what Python's own hash() cannot tell apart
    prompts += [[2**31 - 2] * 16, [0, 0, 0, 2**31 - 1] * 4]
    first = {}
    for prompt in prompts:
        for place, value in enumerate(hashed(student, prompt)):
            prefix = tuple(prompt[: (place + 1) * SIZE])
            seen = first.setdefault(value, prefix)
            assert seen == prefix, (
                f"the hash of block {place} of {list(prefix)} is that of the last block of "
                f"{list(seen)}: a sequence would be given the keys and values of another prefix"
            )
        assert hashed(student, list(prompt)) == hashed(student, prompt), "no hash comes out twice"
    again = hashes_elsewhere(student)
    assert again == repr(hashed(student, range(8))), (
        "another Python process gives other hashes of the same tokens; do not use what depends on "
        "PYTHONHASHSEED, nor on the addresses of objects"
    )
    taken = seconds_to_hash(student, 200_000, 16)
    assert taken < 10, f"200,000 tokens took {taken:.0f} s: hash each block with the one before it"


def assert_blocks(student, tokens, cached, expected, case):
    got = list(student.cached_blocks(list(tokens), SIZE, dict(cached)))
    assert got == expected, f"{case}: expected the blocks {expected}, got {got}"


def test_the_longest_cached_prefix(student):
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


def test_something_is_left_to_compute(student):
    tokens = list(range(12))
    numbers = dict(zip(hashed(student, tokens), (5, 6, 7), strict=True))
    case = "12 tokens, all three blocks cached: the last one is left to compute"
    assert_blocks(student, tokens, numbers, [5, 6], case)
    assert_blocks(student, [*tokens, 99], numbers, [5, 6, 7], "13 tokens, three blocks cached")
    assert_blocks(student, tokens[:4], numbers, [], "4 tokens, their only block cached")
    assert_blocks(student, tokens[:5], numbers, [5], "5 tokens, one whole block, cached")
    assert_blocks(student, tokens[:3], numbers, [], "3 tokens, no whole block")
    assert_blocks(student, [], numbers, [], "no token")
