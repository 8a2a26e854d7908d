"""Task 1: small stories by hand, then random ones with the invariants looked at after each step."""

import random

from grader_lives import random_life

SIZE = 4  # tokens of a block


def grown(manager, sequence, start, stop, case):
    copies = manager.grow(sequence, start, stop)
    assert copies is not None, f"{case}: grow({sequence!r}, {start}, {stop}) found too few blocks"
    return [tuple(copy) for copy in copies]


def assert_free(manager, expected, case):
    assert manager.num_free == expected, (
        f"{case}: num_free is {manager.num_free}, expected {expected}"
    )


def assert_whole(manager, sequences, num_blocks, case):
    tables = {sequence: manager.table(sequence) for sequence in sequences}
    assert_all_accounted(tables, manager.num_free, num_blocks, case)


def assert_all_accounted(tables, num_free, num_blocks, case):
    """Every block in a table is a block, none is twice in one, and used + free = all."""
    used = set()
    for sequence, table in tables.items():
        for block in table:
            assert isinstance(block, int) and 0 <= block < num_blocks, (
                f"{case}: the table of {sequence!r} is {table}, of blocks 0 to {num_blocks - 1}"
            )
        assert len(set(table)) == len(table), (
            f"{case}: the table of {sequence!r} holds a block twice: {table}"
        )
        used |= set(table)
    assert num_free + len(used) == num_blocks, (
        f"{case}: {len(used)} blocks are in a table and num_free is {num_free}, of "
        f"{num_blocks} in all"
    )


def test_blocks_are_given_and_taken_back(student):
    manager = student.make_block_manager(6, SIZE)
    assert_free(manager, 6, "new, of 6 blocks")
    assert manager.table("a") == [], "the table of an unknown sequence is not empty"
    grown(manager, "a", 0, 5, "new")
    assert_free(manager, 4, "5 tokens in blocks of 4, of 6")
    first = manager.table("a")
    grown(manager, "a", 5, 8, "5 tokens, then 8")
    assert manager.table("a") == first, (
        f"tokens 5 to 7 fit into the blocks {first}, and the table is now {manager.table('a')}"
    )
    grown(manager, "a", 8, 9, "8 tokens, then 9")
    assert manager.table("a")[:2] == first and len(manager.table("a")) == 3, (
        f"a ninth token adds one block to {first}; the table is {manager.table('a')}"
    )
    manager.table("a").clear()
    assert len(manager.table("a")) == 3, "the caller changed the list that table returned"
    grown(manager, "b", 0, 12, "three blocks are left")
    assert_whole(manager, "ab", 6, "two sequences of three blocks each")
    manager.free("a")
    manager.free("a")
    manager.free("nobody")
    assert_free(manager, 3, "one of two sequences freed, twice")
    assert manager.table("a") == [], "a freed sequence still has a table"
    grown(manager, "c", 0, 12, "three blocks came back")
    assert_whole(manager, "bc", 6, "blocks used again")


def test_all_or_nothing_when_blocks_run_out(student):
    manager = student.make_block_manager(3, SIZE)
    case = "3 blocks of 4, and 13 tokens"
    assert manager.grow("a", 0, 13) is None, f"{case}: grow did not return None"
    assert manager.table("a") == [] and manager.num_free == 3, (
        f"{case}: nothing may be changed where there is no room, and the table is "
        f"{manager.table('a')} with {manager.num_free} blocks free"
    )
    grown(manager, "a", 0, 7, "3 blocks of 4")
    before = manager.table("a")
    assert manager.grow("a", 7, 13) is None, "two blocks held, one free, four wanted: not None"
    assert manager.table("a") == before and manager.num_free == 1, (
        "two blocks held, one free, four wanted: nothing may be changed, and the table went from "
        f"{before} to {manager.table('a')} with {manager.num_free} free"
    )
    grown(manager, "a", 7, 12, "the last block")
    assert manager.grow("b", 0, 1) is None, "no block is free, and grow did not return None"
    assert grown(manager, "a", 11, 12, "full, but these are there") == [], "a copy without a fork"


def test_a_fork_shares_and_copies_before_it_writes(student):
    manager = student.make_block_manager(6, SIZE)
    grown(manager, "parent", 0, 10, "new")
    manager.fork("parent", "child")
    assert manager.table("child") == manager.table("parent"), "a fork has other blocks"
    assert_free(manager, 3, "three blocks in two sequences, of 6")
    before = manager.table("parent")
    copies = grown(manager, "child", 10, 11, "fork of 10 tokens, then one more")
    after = manager.table("child")
    assert after[2] != before[2], (
        f"block {before[2]} is used by two sequences and token 10 will be written into it; the "
        f"child's table is still {after}"
    )
    assert after[:2] == before[:2], (
        f"the child wrote token 10, in its third block, and its table went from {before} to "
        f"{after}: it replaced a block which holds none of the tokens to be written"
    )
    assert copies == [(before[2], after[2])], (
        f"the copies are {copies}, expected {[(before[2], after[2])]}"
    )
    assert manager.table("parent") == before, "the child's copy changed the parent's table"
    assert_free(manager, 2, "one block copied")
    again = grown(manager, "parent", 10, 11, "the parent is alone in its third block now")
    assert again == [], f"the parent's block is its own by now, and was copied: {again}"
    manager.free("parent")
    assert_whole(manager, ["child"], 6, "the parent of a fork is freed")
    assert_free(manager, 3, "the parent is freed, the child has three blocks")
    manager.fork("child", "grandchild")
    manager.fork("child", "sister")
    grown(manager, "sister", 0, 0, "nothing to write")
    assert manager.table("sister") == manager.table("child"), "nothing written, and yet copied"
    assert manager.grow("sister", 0, 13) is None, (
        "three shared blocks to copy and one to add, and 3 free: grow did not return None"
    )
    assert manager.table("sister") == manager.table("child") and manager.num_free == 3, (
        "too few blocks to copy them: nothing may be changed"
    )


def test_long_random_lives_lose_no_block(student):
    for seed in range(12):
        blocks = random.Random(seed).randint(3, 20)
        contents, cache = {}, {}
        life = random_life(student, seed, blocks, SIZE, 150)
        for step, (kind, name, start, end, copies, tables, num_free) in enumerate(life):
            case = f"seed {seed}, step {step}"
            if kind == "fork":
                contents[end] = list(contents[name])
            elif kind == "free":
                del contents[name]
            else:
                contents.setdefault(name, [])
                if copies is not None:
                    write(cache, tables[name], copies, contents[name], range(start, end), case)
            assert_all_accounted(tables, num_free, blocks, case)
            for sequence, expected in contents.items():
                assert_contents(cache, sequence, tables[sequence], expected, case)


def write(cache, table, copies, contents, tokens, case):
    """Do as an engine does when a sequence has grown: copy what grow says, then write."""
    for old, new in copies:
        for place in range(SIZE):
            cache[new, place] = cache.get((old, place))
    assert len(table) == -(-tokens.stop // SIZE), (
        f"{case}: {tokens.stop} tokens in blocks of {SIZE}, and the table is {table}"
    )
    for token in tokens:
        cache[table[token // SIZE], token % SIZE] = (case, token)
        contents.append((case, token))


def assert_contents(cache, sequence, table, expected, case):
    found = [cache.get((table[i // SIZE], i % SIZE)) for i in range(len(expected))]
    wrong = [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]
    assert not wrong, (
        f"{case}: token {wrong[0]} of {sequence} was overwritten; its block "
        f"{table[wrong[0] // SIZE]} is used by two sequences, or was given away"
    )
