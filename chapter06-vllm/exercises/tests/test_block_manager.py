"""Task 1: small stories by hand, then random ones with every promise looked at after each step."""

from grader_tables import asked_and_seen

SIZE = 4  # tokens of a block, in the stories by hand


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
    assert_accounted(tables, manager.num_free, num_blocks, case)


def assert_accounted(tables, num_free, num_blocks, case):
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


def test_blocks_are_given_and_taken_back(student, chance):
    manager = student.make_block_manager(6, SIZE)
    assert_free(manager, 6, "new, of 6 blocks")
    assert manager.table("a") == [], "the table of an unknown sequence is not empty"
    grown(manager, "a", 0, 5, "new")
    assert_free(manager, 4, "5 tokens in blocks of 4, of 6")
    first = list(manager.table("a"))
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
    for _ in range(10):
        Life(student, chance, kinds=["new", "grow", "grow", "grow", "free"]).live(60)


def test_all_or_nothing_when_blocks_run_out(student, chance):
    manager = student.make_block_manager(3, SIZE)
    case = "3 blocks of 4, and 13 tokens"
    assert manager.grow("a", 0, 13) is None, f"{case}: grow did not return None"
    assert manager.table("a") == [] and manager.num_free == 3, (
        f"{case}: nothing may be changed where there is no room, and the table is "
        f"{manager.table('a')} with {manager.num_free} blocks free"
    )
    grown(manager, "a", 0, 7, "3 blocks of 4")
    before = list(manager.table("a"))
    assert manager.grow("a", 7, 13) is None, "two blocks held, one free, four wanted: not None"
    assert manager.table("a") == before and manager.num_free == 1, (
        "two blocks held, one free, four wanted: nothing may be changed, and the table went from "
        f"{before} to {manager.table('a')} with {manager.num_free} free"
    )
    grown(manager, "a", 7, 12, "the last block")
    assert manager.grow("b", 0, 1) is None, "no block is free, and grow did not return None"
    assert grown(manager, "a", 11, 12, "full, but these are there") == [], "a copy without a fork"
    for _ in range(10):
        Life(student, chance, kinds=["new", "grow", "grow", "free"], scarce=True).live(60)


def test_a_fork_shares_and_copies_before_it_writes(student, chance):
    manager = student.make_block_manager(6, SIZE)
    grown(manager, "parent", 0, 10, "new")
    manager.fork("parent", "child")
    assert manager.table("child") == manager.table("parent"), "a fork has other blocks"
    assert_free(manager, 3, "three blocks in two sequences, of 6")
    before = list(manager.table("parent"))
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
    for number in range(16):
        kinds = ["new", "grow", "grow", "fork", "fork", "free"][: 5 + number % 2]
        Life(student, chance, kinds, scarce=number % 4 == 0).live(40)


def test_long_random_lives_lose_no_block(student, chance):
    for _ in range(8):
        Life(student, chance, ["new", "grow", "grow", "grow", "fork", "free"]).live(150)


class Life:
    """Sequences at random, and beside the manager a cache that shows what it would hold."""

    def __init__(self, student, chance, kinds, scarce=False):
        self.chance, self.kinds = chance, kinds
        self.size = int(chance.choice([1, 2, 3, 4, 5, 16]))
        self.blocks = int(chance.integers(1, 6 if scarce else 25))
        self.manager = student.make_block_manager(self.blocks, self.size)
        self.contents, self.cache, self.history = {}, {}, []
        self.tables, self.free = {}, self.blocks  # as they were at the last look

    def __str__(self):
        told = ", ".join(self.history[-6:])
        return f"{self.blocks} blocks of {self.size} tokens, after … {told}"

    def live(self, steps):
        assert_free(self.manager, self.blocks, f"new, of {self.blocks} blocks")
        for step in range(steps):
            kind = str(self.chance.choice(self.kinds))
            known = list(self.contents)
            name = known[self.chance.integers(len(known))] if known else None
            text = "" if "" not in known else str(step - 2)  # a number's text is another name
            new = [f"s{step}", step, (step, "a"), text][step % 4]
            if kind == "new":
                self.contents[new] = []
                self.write(new, step)
            elif known and kind == "fork":
                self.contents[new] = list(self.contents[name])
                self.ask("fork", name, new)
                tables = self.tables[name], self.tables[new]
                assert tables[0] == tables[1], f"{self}: a fork has other blocks, {tables}"
            elif known and kind == "free":
                self.ask("free", name)
                del self.contents[name]
                table = self.tables.pop(name)
                assert table == [], f"{self}: {name!r} still has a table, {table}"
            elif known:
                self.write(name, step)
            self.look()

    def ask(self, method, *arguments):
        """What a method returns; and look at the tables of all sequences afterwards."""
        self.history.append(f"{method}({', '.join(map(repr, arguments))})")
        names = list(self.contents)
        answer, tables, self.free = asked_and_seen(self.manager, names, method, *arguments)
        self.tables = {name: list(table) for name, table in tables.items()}
        return answer

    def write(self, name, step):
        """Grow as an engine does: copy what grow says, then write, at the end or further ahead."""
        content = self.contents[name]
        start = len(content)
        if self.chance.random() < 0.3:
            start = int(self.chance.integers(start + 1))
        stop = start + int(self.chance.integers(0, 2 * self.size + 3))
        before, free = {name: [], **self.tables}, self.free
        first, needed = start // self.size, -(-stop // self.size)
        own = before[name]
        touched = own[first:needed] if stop > start else []
        shared = [block for block in touched if sum(block in t for t in before.values()) > 1]
        added = max(0, needed - len(own)) if stop > start else 0
        copies = self.ask("grow", name, start, stop)
        after = self.tables
        case = f"{self}, the table {own}, {len(shared)} of its blocks to copy, {added} to add"
        if len(shared) + added > free:
            assert copies is None, f"{case}, and {free} free: expected None, got {copies}"
            assert after == before and self.free == free, (
                f"{case}, and {free} free: nothing may be changed, and the tables went from "
                f"{before} to {after}"
            )
            return
        assert copies is not None, f"{case}, and {free} free: grow found too few blocks"
        table = after[name]
        pairs = [(a, b) for a, b in zip(own, table, strict=False) if a != b]
        assert len(table) == len(own) + added, f"{case}: the table is {table}"
        assert [a for a, _ in pairs] == shared, (
            f"{case}: expected the blocks {shared} to be replaced, which this sequence shares and "
            f"will write to; the table is {table}"
        )
        assert sorted(map(tuple, copies)) == sorted(pairs), (
            f"{case}: the copies are {copies}, and the table {table} says {pairs}"
        )
        given = table[len(own) :] + [b for _, b in pairs]
        in_use = {block for one in before.values() for block in one}
        assert not in_use & set(given), f"{case}: {given} were given, of which some were in use"
        others = {other for other in before if other != name and before[other] != after[other]}
        assert not others, f"{case}: the tables of {others} changed too"
        for old, new in copies:
            for place in range(self.size):
                self.cache[new, place] = self.cache.get((old, place))
        for token in range(start, stop):
            self.cache[table[token // self.size], token % self.size] = (step, token)
        content[start:stop] = [(step, token) for token in range(start, stop)]

    def look(self):
        assert_accounted(self.tables, self.free, self.blocks, self)
        for name, expected in self.contents.items():
            table = self.tables[name]
            places = [(table[i // self.size], i % self.size) for i in range(len(expected))]
            wrong = [i for i, place in enumerate(places) if self.cache.get(place) != expected[i]]
            assert not wrong, (
                f"{self}: token {wrong[0]} of {name!r} was overwritten; its block "
                f"{places[wrong[0]][0]} is used by two sequences, or was given away"
            )
