"""Task 4: prefills followed token by token, and caches moved head by head."""

from dataclasses import dataclass, replace
from itertools import pairwise

SOURCE, TARGET = list(range(100, 160)), list(range(500, 560))


@dataclass
class Layout:
    stages: int
    ranks: int


def assert_sent(student, steps, cached, present, size, tables, expected, why):
    handed = [list(steps), *map(list, tables)]
    got = student.blocks_to_send(handed[0], cached, present, size, *handed[1:])
    case = (
        f"steps of {list(steps)} tokens after {cached} cached ones, {present} blocks present, "
        f"blocks of {size}, tables {list(tables[0])!r:.70} and {list(tables[1])!r:.70}"
    )
    assert handed == [list(steps), *map(list, tables)], f"{case}: the arguments were changed"
    got = [[tuple(pair) for pair in step] for step in got]
    assert len(got) == len(steps), f"{case}: expected {len(steps)} lists, got {len(got)}, {got}"
    for number, (wanted, found) in enumerate(zip(expected, got, strict=True)):
        assert found == wanted, (
            f"{case}: expected {wanted} to be sent after step {number}, got {found} ({why})"
        )


def by_tokens(steps, cached, present, size, source, target):
    """Token by token: a block goes when its last token is there, or the prompt's."""
    total, left = cached + sum(steps), {}
    for token in range(total):
        left.setdefault(token // size, []).append(token)
    waiting = {block: max(tokens) for block, tokens in left.items() if block >= present}
    short = {block for block, tokens in left.items() if len(tokens) < size}
    computed, plan = cached, []
    for number, step in enumerate(steps):
        computed += step
        last = number == len(steps) - 1
        ready = [
            block
            for block, token in waiting.items()
            if token < computed and (last or block not in short)
        ]
        plan.append([(source[block], target[block]) for block in sorted(ready)])
        for block in ready:
            del waiting[block]
    return plan


def assert_random_prefills(student, chance, count, cached, present):
    for _ in range(count):
        size = int(chance.choice([1, 2, 3, 4, 16]))
        most = int(chance.choice([2, 2 * size + 2, 4 * size]))
        steps = chance.integers(0, most, chance.integers(1, 7)).tolist()
        found = int(chance.integers(0, 4 * size)) if cached else 0
        steps[0] += not found + sum(steps)  # a prompt has a token
        blocks = -(-(found + sum(steps)) // size)
        whole = (found + sum(steps)) // size
        there = int(chance.integers(0, whole + 1)) if present else 0
        spare = int(chance.integers(3))
        tables = [chance.permutation(200)[: blocks + spare].tolist() for _ in range(2)]
        expected = by_tokens(steps, found, there, size, *tables)
        assert_sent(student, steps, found, there, size, tables, expected, "token by token")


def pairs(*blocks):
    return [(SOURCE[block], TARGET[block]) for block in blocks]


def test_blocks_go_as_soon_as_they_are_complete(student, chance):
    for steps, size, expected, why in (
        ([4, 4], 4, [pairs(0), pairs(1)], "a block in each step"),
        ([6, 6], 4, [pairs(0), pairs(1, 2)], "the second block becomes complete in step 1"),
        ([3, 3, 3], 4, [[], pairs(0), pairs(1, 2)], "the last one is not full, but is the last"),
        ([5], 4, [pairs(0, 1)], "one step is the last"),
        ([3], 4, [pairs(0)], "one block that is not full"),
        ([8], 4, [pairs(0, 1)], "full to the last"),
        ([9, 0], 4, [pairs(0, 1), pairs(2)], "complete after step 1, as far as anyone knows"),
        ([0, 4, 0, 5], 4, [[], pairs(0), [], pairs(1, 2)], "steps without a token"),
        ([2, 3], 1, [pairs(0, 1), pairs(2, 3, 4)], "blocks of one"),
        ([1] * 5, 4, [[], [], [], pairs(0), pairs(1)], "token by token"),
    ):
        assert_sent(student, steps, 0, 0, size, (SOURCE, TARGET), expected, why)
    assert_random_prefills(student, chance, 120, cached=False, present=False)


def test_what_is_cached_on_either_side(student, chance):
    for steps, cached, present, expected, why in (
        ([4, 4], 8, 0, [pairs(0, 1, 2), pairs(3)], "what is cached goes with the first step"),
        ([3, 4], 6, 0, [pairs(0, 1), pairs(2, 3)], "a cached prefix may end within a block"),
        ([0, 4], 4, 0, [pairs(0), pairs(1)], "also with a step without a token"),
        ([6, 6], 0, 1, [[], pairs(1, 2)], "block 0 is present"),
        ([6, 6, 6], 0, 2, [[], pairs(2), pairs(3, 4)], "blocks 0 and 1 are present"),
        ([5, 5], 0, 2, [[], pairs(2)], "only the last, partial one is missing"),
        ([4, 4], 0, 2, [[], []], "all is present"),
        ([4, 4], 4, 2, [pairs(2)[:1], []][::-1], "one of the two is cached, and both present"),
        ([2, 3], 8, 1, [pairs(1), pairs(2, 3)], "more is cached here than is present there"),
        ([2, 3], 3, 2, [[], []], "more is present there than is complete here"),
    ):
        assert_sent(student, steps, cached, present, 4, (SOURCE, TARGET), expected, why)
    assert_random_prefills(student, chance, 100, cached=True, present=False)
    assert_random_prefills(student, chance, 100, cached=False, present=True)
    assert_random_prefills(student, chance, 100, cached=True, present=True)


def owned(layers, heads, layout):
    """Of each rank, its layers and its heads, in order: dealt out one by one."""
    ranks = []
    for stage in range(layout.stages):
        here = [
            layer
            for layer in range(layers)
            if stage * layers // layout.stages <= layer < (stage + 1) * layers // layout.stages
        ]
        for place in range(layout.ranks):
            if layout.ranks <= heads:
                own = [head for head in range(heads) if head * layout.ranks // heads == place]
            else:
                own = [place * heads // layout.ranks]
            ranks.append((here, own))
    return ranks


def by_heads(layers, heads, source, target):
    """Head by head and layer by layer: who has it, who wants it, and which copy is meant."""
    have, want = owned(layers, heads, source), owned(layers, heads, target)
    moved = {}
    for layer in range(layers):
        for head in range(heads):
            givers = [r for r, (there, own) in enumerate(have) if layer in there and head in own]
            takers = [r for r, (there, own) in enumerate(want) if layer in there and head in own]
            for copy, taker in enumerate(takers):
                giver = givers[copy % len(givers)]
                moved.setdefault((giver, taker), []).append((layer, head))
    copies = []
    for (giver, taker), items in sorted(moved.items()):
        there, own = sorted({a for a, _ in items}), sorted({b for _, b in items})
        copies.append(
            (giver, taker, there[0], len(there), have[giver][1].index(own[0]),
             want[taker][1].index(own[0]), len(own))
        )  # fmt: skip
    return copies


def assert_map(student, layers, heads, source, target, expected, why):
    handed = replace(source), replace(target)
    got = [tuple(copy) for copy in student.rank_map(layers, heads, *handed)]
    case = (
        f"{layers} layers of {heads} heads, from {source.stages} stages of {source.ranks} ranks to "
        f"{target.stages} of {target.ranks}"
    )
    assert handed == (source, target), f"{case}: the layouts were changed"
    for copy in got:
        assert len(copy) == 7 and all(type(number) is int for number in copy), (
            f"{case}: {copy} is no Copy of seven ints"
        )
    pairs_got, pairs_expected = [c[:2] for c in got], [c[:2] for c in expected]
    assert pairs_got == pairs_expected, (
        f"{case}: expected the pairs (source, target) {pairs_expected}, got {pairs_got} ({why})"
    )
    for wanted, found in zip(expected, got, strict=True):
        assert found == wanted, f"{case}: expected the copy {wanted}, got {found} ({why})"


def assert_random_maps(student, chance, count, stages, copies):
    """With up to so many stages."""
    for _ in range(count):
        heads = int(chance.choice([1, 2, 3, 4, 6, 8, 12]))
        degrees = [n for n in range(1, heads + 1) if heads % n == 0]
        if copies:
            degrees += [2 * heads, 3 * heads, 4 * heads]
        source, target = (
            Layout(int(chance.integers(1, stages + 1)), int(chance.choice(degrees)))
            for _ in range(2)
        )
        layers = int(chance.integers(max(source.stages, target.stages), 3 * stages + 9))
        expected = by_heads(layers, heads, source, target)
        assert_map(student, layers, heads, source, target, expected, "head by head")


def refused(student, layers, heads, source, target, why):
    try:
        got = student.rank_map(layers, heads, Layout(*source), Layout(*target))
    except ValueError:
        return
    raise AssertionError(
        f"rank_map({layers}, {heads}, Layout{source}, Layout{target}): {why}: expected a "
        f"ValueError, got {list(got)!r:.200}"
    )


def test_other_tensor_parallel_degrees(student, chance):
    for heads, source, target, expected, why in (
        (8, 1, 1, [(0, 0, 0, 3, 0, 0, 8)], "one rank each"),
        (8, 2, 2, [(0, 0, 0, 3, 0, 0, 4), (1, 1, 0, 3, 0, 0, 4)], "rank to rank"),
        (8, 1, 2, [(0, 0, 0, 3, 0, 0, 4), (0, 1, 0, 3, 4, 0, 4)], "one divided in two"),
        (8, 2, 1, [(0, 0, 0, 3, 0, 0, 4), (1, 0, 0, 3, 0, 4, 4)], "two put together"),
        (6, 2, 3, [(0, 0, 0, 3, 0, 0, 2), (0, 1, 0, 3, 2, 0, 1), (1, 1, 0, 3, 0, 1, 1),
                   (1, 2, 0, 3, 1, 0, 2)], "neither is a multiple of the other"),
    ):  # fmt: skip
        assert_map(student, 3, heads, Layout(1, source), Layout(1, target), expected, why)
    assert_random_maps(student, chance, 60, stages=1, copies=False)
    for heads, source, target, why in (
        (8, (1, 3), (1, 2), "8 heads on 3 ranks"),
        (8, (1, 2), (1, 6), "8 heads on 6 ranks"),
        (8, (1, 12), (1, 2), "8 heads on 12 ranks"),
        (0, (1, 1), (1, 1), "no head"),
        (-1, (1, 1), (1, 1), "no head"),
        *((8, (1, none), (1, 2), "no rank") for none in (0, -1)),
        *((8, (1, 2), (1, none), "no rank") for none in (0, -1)),
    ):
        refused(student, 4, heads, source, target, why)


def test_other_stages_and_shared_heads(student, chance):
    for layers, heads, source, target, expected, why in (
        (4, 2, (2, 1), (1, 1), [(0, 0, 0, 2, 0, 0, 2), (1, 0, 2, 2, 0, 0, 2)], "two stages to one"),
        (5, 2, (1, 1), (2, 1), [(0, 0, 0, 2, 0, 0, 2), (0, 1, 2, 3, 0, 0, 2)], "2 and 3 layers"),
        (3, 2, (3, 1), (2, 1), [(0, 0, 0, 1, 0, 0, 2), (1, 1, 1, 1, 0, 0, 2),
                                (2, 1, 2, 1, 0, 0, 2)], "three stages to two"),
        (2, 2, (1, 1), (1, 4), [(0, 0, 0, 2, 0, 0, 1), (0, 1, 0, 2, 0, 0, 1),
                                (0, 2, 0, 2, 1, 0, 1), (0, 3, 0, 2, 1, 0, 1)],
         "ranks 0 and 1 have head 0, ranks 2 and 3 head 1"),
        (2, 2, (1, 4), (1, 1), [(0, 0, 0, 2, 0, 0, 1), (2, 0, 0, 2, 0, 1, 1)],
         "each head comes once, from its first copy"),
        (2, 1, (1, 2), (1, 4), [(0, 0, 0, 2, 0, 0, 1), (0, 2, 0, 2, 0, 0, 1),
                                (1, 1, 0, 2, 0, 0, 1), (1, 3, 0, 2, 0, 0, 1)],
         "the copies share the work in turns"),
        (2, 1, (1, 3), (1, 2), [(0, 0, 0, 2, 0, 0, 1), (1, 1, 0, 2, 0, 0, 1)],
         "two copies for two, the third has nothing to do"),
        (61, 8, (7, 1), (1, 1), [(stage, 0, first, end - first, 0, 0, 8) for stage, (first, end)
                                 in enumerate(pairwise([0, 8, 17, 26, 34, 43, 52, 61]))],
         "61 / 7 has no end"),
        (22, 1, (22, 1), (22, 1), [(s, s, s, 1, 0, 0, 1) for s in range(22)], "a layer each"),
    ):  # fmt: skip
        assert_map(student, layers, heads, Layout(*source), Layout(*target), expected, why)
    assert_random_maps(student, chance, 40, stages=4, copies=False)
    assert_random_maps(student, chance, 40, stages=1, copies=True)
    assert_random_maps(student, chance, 40, stages=4, copies=True)
    assert_random_maps(student, chance, 6, stages=24, copies=False)
    for layers, source, target, why in (
        (2, (3, 1), (1, 1), "three stages of two layers"),
        (2, (1, 1), (3, 1), "three stages of two layers"),
        *((none, (1, 1), (1, 1), "no layer") for none in (0, -1)),
        *((2, (none, 1), (1, 1), "no stage") for none in (0, -1)),
        *((2, (1, 1), (none, 1), "no stage") for none in (0, -1)),
    ):
        refused(student, layers, 4, source, target, why)
