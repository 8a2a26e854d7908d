"""Blocks of the KV cache: tables, sharing, prefix caching, eviction, copy on write."""

import pytest

from paged_engine.block_manager import BlockManager
from paged_engine.request import Request, Sequence
from paged_engine.sampling_params import SamplingParams

SIZE = 4


def sequence_of(tokens: list[int]) -> Sequence:
    return Request("r", tokens, SamplingParams()).sequences[0]


def compute(blocks: BlockManager, tokens: list[int]) -> Sequence:
    """A sequence that found what it could, and computed the rest."""
    sequence = sequence_of(tokens)
    blocks.match_prefix(sequence)
    assert blocks.allocate(sequence, len(tokens)) == []
    blocks.computed(sequence, len(tokens))
    blocks.check()
    return sequence


def tokens_from(first: int, count: int) -> list[int]:
    return list(range(first, first + count))


def test_a_sequence_gets_as_many_blocks_as_its_tokens_need() -> None:
    blocks = BlockManager(8, SIZE)
    sequence = sequence_of(tokens_from(0, 9))
    assert blocks.allocate(sequence, 4) == []
    assert len(sequence.block_table) == 1
    assert blocks.allocate(sequence, 9) == []
    assert len(sequence.block_table) == 3 and blocks.num_free == 5
    assert blocks.allocate(sequence, 12) == [] and len(sequence.block_table) == 3
    blocks.check()
    blocks.free(sequence)
    assert blocks.num_free == 8 and sequence.block_table == [] and sequence.computed == 0
    blocks.check()


def test_too_few_blocks_change_nothing() -> None:
    blocks = BlockManager(2, SIZE)
    sequence = sequence_of(tokens_from(0, 9))
    assert blocks.allocate(sequence, 4) == []
    before = list(sequence.block_table)
    assert blocks.allocate(sequence, 9) is None
    assert sequence.block_table == before and blocks.num_free == 1
    blocks.check()


def test_a_block_is_found_only_once_it_is_computed() -> None:
    blocks = BlockManager(8, SIZE)
    first, second = sequence_of(tokens_from(0, 9)), sequence_of(tokens_from(0, 9))
    blocks.allocate(first, 9)
    assert blocks.match_prefix(second) == 0
    blocks.computed(first, 7)  # one block and three tokens
    assert blocks.match_prefix(second) == 4
    assert second.block_table == first.block_table[:1]
    blocks.check()


def test_of_a_prompt_all_in_the_cache_the_last_block_is_computed_again() -> None:
    blocks = BlockManager(8, SIZE)
    first = compute(blocks, tokens_from(0, 8))
    second = sequence_of(tokens_from(0, 8))
    assert blocks.match_prefix(second) == 4
    assert (
        blocks.allocate(second, 8) == []
    )  # its own block: no copy, and the first's is not touched
    assert second.block_table[0] == first.block_table[0]
    assert second.block_table[1] != first.block_table[1]
    blocks.computed(second, 8)
    blocks.check()
    blocks.free(first)
    blocks.check()
    longer = sequence_of(tokens_from(0, 9))
    assert blocks.match_prefix(longer) == 8


def test_equal_tokens_after_another_prefix_are_another_block() -> None:
    blocks = BlockManager(8, SIZE)
    compute(blocks, [1, 1, 1, 1, 7, 7, 7, 7])
    other = sequence_of([2, 2, 2, 2, 7, 7, 7, 7, 7])
    assert blocks.match_prefix(other) == 0


def test_a_shared_block_is_freed_with_its_last_holder() -> None:
    blocks = BlockManager(8, SIZE)
    first, second = compute(blocks, tokens_from(0, 9)), compute(blocks, tokens_from(0, 9))
    assert blocks.num_free == 4  # two shared, and a third of each
    blocks.free(first)
    assert blocks.num_free == 5
    blocks.check()
    blocks.free(second)
    assert blocks.num_free == 8 and blocks.num_cached == 2
    blocks.check()


def test_the_longest_unused_block_is_evicted_first() -> None:
    blocks = BlockManager(4, SIZE)
    for first in (0, 100):
        blocks.free(compute(blocks, tokens_from(first, 4)))
    blocks.free(compute(blocks, tokens_from(0, 5)))  # used again: now 100's is the oldest
    compute(blocks, tokens_from(200, 12))
    assert blocks.evictions == 1
    assert blocks.match_prefix(sequence_of(tokens_from(100, 5))) == 0
    assert blocks.match_prefix(sequence_of(tokens_from(0, 5))) == 4


def test_of_one_sequence_the_last_block_is_evicted_first() -> None:
    blocks = BlockManager(3, SIZE)
    blocks.free(compute(blocks, tokens_from(0, 12)))
    compute(blocks, tokens_from(100, 4))
    assert blocks.match_prefix(sequence_of(tokens_from(0, 13))) == 8


def test_a_block_without_known_contents_is_taken_before_any_is_evicted() -> None:
    blocks = BlockManager(3, SIZE)
    blocks.free(compute(blocks, tokens_from(0, 6)))  # one full block, one that nobody can find
    compute(blocks, tokens_from(100, 8))
    assert blocks.evictions == 0 and blocks.num_free == 1
    assert blocks.match_prefix(sequence_of(tokens_from(0, 5))) == 4


def test_a_block_found_again_is_not_free_any_more() -> None:
    blocks = BlockManager(2, SIZE)
    blocks.free(compute(blocks, tokens_from(0, 4)))
    holder = sequence_of(tokens_from(0, 5))
    assert blocks.match_prefix(holder) == 4 and blocks.num_free == 1
    assert blocks.allocate(sequence_of(tokens_from(100, 8)), 8) is None
    blocks.check()


def test_twins_that_were_computed_side_by_side() -> None:
    blocks = BlockManager(8, SIZE)
    twins = [sequence_of(tokens_from(0, 5)) for _ in range(2)]
    for twin in twins:
        assert blocks.match_prefix(twin) == 0
        blocks.allocate(twin, 5)
    for twin in twins:
        blocks.computed(twin, 5)
    blocks.check()
    assert blocks.num_cached == 1
    for twin in twins:
        blocks.free(twin)
        blocks.check()
    assert blocks.match_prefix(sequence_of(tokens_from(0, 5))) == 4


def test_forked_sequences_copy_a_block_when_they_write() -> None:
    blocks = BlockManager(8, SIZE)
    parent = compute(blocks, tokens_from(0, 6))
    children = [sequence_of(tokens_from(0, 6)) for _ in range(2)]
    for child in children:
        blocks.fork(parent, child)
    blocks.check()
    assert blocks.num_free == 6
    shared = parent.block_table[1]
    family = [parent, *children]
    copies = []
    for member in family:
        member.token_ids.append(99)
        copies.append(blocks.allocate(member, 7))
        blocks.check()
    assert copies[0] == [(shared, parent.block_table[1])]
    assert copies[1] == [(shared, children[0].block_table[1])]
    assert copies[2] == []  # the last holder writes into the block itself
    assert children[1].block_table[1] == shared
    assert {member.block_table[0] for member in family} == {parent.block_table[0]}
    assert blocks.num_free == 4


def test_a_fork_at_the_end_of_a_block_copies_nothing() -> None:
    blocks = BlockManager(8, SIZE)
    parent, child = compute(blocks, tokens_from(0, 8)), sequence_of(tokens_from(0, 8))
    blocks.fork(parent, child)
    assert blocks.allocate(child, 9) == [] and blocks.allocate(parent, 9) == []
    assert child.block_table[:2] == parent.block_table[:2]
    assert child.block_table[2] != parent.block_table[2]
    blocks.check()


def test_a_copy_needs_a_free_block() -> None:
    blocks = BlockManager(2, SIZE)
    parent, child = compute(blocks, tokens_from(0, 6)), sequence_of(tokens_from(0, 6))
    blocks.fork(parent, child)
    assert blocks.allocate(child, 7) is None
    assert child.block_table == parent.block_table
    blocks.check()
    blocks.free(parent)
    assert blocks.allocate(child, 7) == []
    blocks.check()


def test_without_prefix_caching_nothing_is_found_or_counted() -> None:
    blocks = BlockManager(8, SIZE, prefix_caching=False)
    blocks.free(compute(blocks, tokens_from(0, 8)))
    assert blocks.match_prefix(sequence_of(tokens_from(0, 9))) == 0
    assert (blocks.queries, blocks.hits, blocks.num_cached) == (0, 0, 0)


def test_queries_and_hits_are_tokens() -> None:
    blocks = BlockManager(8, SIZE)
    compute(blocks, tokens_from(0, 9))
    compute(blocks, tokens_from(0, 10))
    assert (blocks.queries, blocks.hits) == (19, 8)


def test_fits_counts_a_cached_block_that_is_free_as_room_but_one_in_use_as_saved() -> None:
    blocks = BlockManager(3, SIZE)
    holder = compute(blocks, tokens_from(0, 8))
    assert blocks.fits(sequence_of(tokens_from(0, 9)))  # two shared, one more
    assert not blocks.fits(sequence_of(tokens_from(0, 9)), spare=1)
    assert not blocks.fits(sequence_of(tokens_from(100, 5)))
    blocks.free(holder)
    assert blocks.fits(sequence_of(tokens_from(0, 9)))
    assert not blocks.fits(sequence_of(tokens_from(0, 9)), spare=1)
    assert blocks.fits(sequence_of(tokens_from(100, 12)))


@pytest.mark.parametrize("damage", ["held twice", "counted twice", "free and held", "lost", "hash"])
def test_the_check_finds_damage(damage: str) -> None:
    blocks = BlockManager(8, SIZE)
    first, second = compute(blocks, tokens_from(0, 8)), compute(blocks, tokens_from(100, 8))
    if damage == "held twice":
        second.block_table[0] = first.block_table[0]
    elif damage == "counted twice":
        blocks._references[first.block_table[0]] += 1
    elif damage == "free and held":
        blocks._free[first.block_table[0]] = None
    elif damage == "lost":
        blocks._free.popitem()
    else:
        blocks._hash[first.block_table[0]] = b"another"
    with pytest.raises(AssertionError):
        blocks.check()
