"""Task 2: small trees by hand, then random ones beside a record of who did what to which node."""

from grader_trees import evictor_asked


class Twin:
    """A student's evictor, and beside it a list of nodes, of uses, and of who holds a lock."""

    def __init__(self, student):
        self.evictor = student.make_evictor()
        self.pages, self.parent, self.used = {}, {}, {}
        self.holders, self.history, self.now = [], [], 0
        self.settle("new", self.evictor.evictable, self.evictor.protected)

    def __str__(self):
        told = ", ".join(self.history[-12:])
        return f"after {'… ' if len(self.history) > 12 else ''}{told or 'nothing'}"

    def ask(self, method, *arguments):
        told = f"{method}({', '.join(map(repr, arguments))})"
        self.history.append(told)
        answer, evictable, protected = evictor_asked(self.evictor, method, *arguments)
        return answer, (told, evictable, protected)

    def settle(self, told, evictable, protected):
        kept = sum(self.pages[node] for node in self.locked())
        expected = sum(self.pages.values()) - kept, kept
        assert (evictable, protected) == expected, (
            f"{self}: expected {expected[0]} pages evictable and {expected[1]} protected, got "
            f"{evictable} and {protected}"
        )

    def above(self, node):
        """The node and all above it."""
        return [] if node is None else [node, *self.above(self.parent[node])]

    def locked(self):
        return {node for holder in self.holders for node in self.above(holder)}

    def add(self, node, parent, pages):
        _, seen = self.ask("add", node, parent, pages)
        self.now += 1
        self.parent[node], self.pages[node], self.used[node] = parent, pages, self.now
        self.settle(*seen)

    def split(self, node, upper, pages):
        _, seen = self.ask("split", node, upper, pages)
        self.parent[upper], self.parent[node] = self.parent[node], upper
        self.pages[upper], self.used[upper] = pages, self.used[node]
        self.pages[node] -= pages
        self.settle(*seen)

    def use(self, node):
        _, seen = self.ask("use", node)
        self.now += 1
        self.used |= dict.fromkeys(self.above(node), self.now)
        self.settle(*seen)

    def lock(self, node):
        _, seen = self.ask("lock", node)
        self.holders.append(node)
        self.settle(*seen)

    def unlock(self, node):
        _, seen = self.ask("unlock", node)
        self.holders.remove(node)
        self.settle(*seen)

    def evict(self, pages):
        left = f"{self}, then evict({pages})"
        got, seen = self.ask("evict", pages)
        expected, freed = [], 0
        while freed < pages:
            inner = {self.parent[node] for node in self.pages} | self.locked()
            if not (leaves := set(self.pages) - inner):
                break
            oldest = sorted(leaves, key=self.used.__getitem__)[0]
            freed += self.pages.pop(oldest)
            del self.parent[oldest], self.used[oldest]
            expected.append(oldest)
        assert list(got) == expected, f"{left}: expected {expected} to go, got {list(got)}"
        self.settle(*seen)


def grown(student, *nodes):
    """A tree of (name, parent, pages), added in this order."""
    twin = Twin(student)
    for node in nodes:
        twin.add(*node)
    return twin


def random_life(student, chance, steps, kinds):
    """Names are used again when their nodes are gone."""
    twin = Twin(student)
    names = [0, "", (), "0", (0, "a"), -1, *range(1, steps), *map(str, range(1, steps))]
    for _ in range(steps):
        kind = str(chance.choice(kinds))
        name = [name for name in names if name not in twin.pages][chance.integers(3)]
        known = list(twin.pages)
        node = known[chance.integers(len(known))] if known and chance.random() < 0.95 else None
        if kind == "add":
            twin.add(name, node, int(chance.integers(1, 6)))
        elif kind == "split" and node is not None and twin.pages[node] > 1:
            twin.split(node, name, int(chance.integers(1, twin.pages[node])))
        elif kind == "use":
            twin.use(node)
        elif kind == "lock":
            twin.lock(node)
        elif kind == "unlock" and twin.holders:
            twin.unlock(twin.holders[chance.integers(len(twin.holders))])
        elif kind == "evict":
            twin.evict(int(chance.integers(8)))
    for holder in list(twin.holders):
        twin.unlock(holder)
    twin.evict(10**6)


def test_the_leaf_longest_unused_goes_first(student, chance):
    twin = grown(student, ("a", None, 2), ("b", None, 3), ("c", None, 1))
    twin.use("a")
    twin.evict(0)
    twin.evict(3)  # b: exactly enough
    twin.evict(2)  # c has one page, so a goes too
    twin.evict(1)
    twin = grown(student, ("b", None, 1))
    twin.evict(1)
    twin.add("d", None, 1)
    twin.add("b", None, 1)  # is new, whoever had the name
    twin.evict(1)  # d
    twin.add("b", None, 4)  # a name that was there
    twin.add("d", None, 4)
    twin.evict(1)
    for _ in range(40):
        twin = Twin(student)
        for number in range(int(chance.integers(1, 9))):
            twin.add(number, None, int(chance.integers(1, 6)))
        for number in chance.integers(0, len(twin.pages), 4).tolist():
            twin.use(number)
        twin.use(None)
        for pages in chance.integers(0, 7, 5).tolist():
            twin.evict(pages)


def test_a_parent_becomes_a_leaf(student, chance):
    twin = grown(student, ("top", None, 4), ("left", "top", 1), ("right", "top", 1), (0, None, 1))
    twin.evict(3)  # left, right, and then 0: top was used before it, but is no leaf until both went
    twin = grown(student, ("top", None, 1), ("below", "top", 1), ("other", None, 1))
    twin.use("below")  # top, too
    twin.evict(2)  # other, below
    twin = grown(student, ("long", None, 6), ("end", "long", 2), ("other", None, 1))
    twin.use(None)
    twin.split("long", "half", 2)
    twin.use("half")
    twin.evict(3)  # end, long: then half, used last of all, is a leaf, and other goes before it
    twin.evict(4)
    twin = grown(student, ("", None, 2), ("x", "", 1), ("y", "x", 1), ("z", "y", 1))
    twin.split("", 0, 1)
    twin.evict(5)
    for _ in range(30):
        random_life(student, chance, 25, ["add", "add", "add", "split", "use", "evict"])


def test_what_is_locked_stays(student, chance):
    twin = grown(student, ("top", None, 4), ("left", "top", 1), ("right", "top", 2), (0, None, 1))
    twin.lock("left")  # top, too
    twin.lock(None)
    twin.evict(99)  # right and 0
    twin.lock("left")
    twin.unlock("left")
    twin.evict(99)  # it is locked once more
    twin.add("new", "left", 1)  # not locked
    twin.split("top", "upper", 3)
    twin.evict(99)
    twin.unlock(None)
    twin.unlock("left")  # with what it was split from
    twin.evict(99)
    twin = grown(student, (0, None, 5), ("below", 0, 3), ("beside", 0, 1))
    twin.lock("below")
    twin.lock(0)
    twin.split(0, "", 2)
    twin.split("below", "upper", 1)
    twin.unlock(0)
    twin.evict(99)
    twin.unlock("below")
    twin.evict(99)
    # A leaf that is older than its neighbours' parent can only be left by a lock, taken back later.
    twin = grown(student, ("top", None, 1), ("old", None, 1), ("below", "top", 1))
    twin.lock("old")
    twin.use("below")  # top, too
    twin.evict(1)  # below
    twin.unlock("old")
    twin.evict(1)  # old
    twin = grown(student, ("top", None, 1), ("old", None, 1))
    twin.lock("old")
    twin.add("below", "top", 1)  # does not use top
    twin.evict(1)  # below
    twin.unlock("old")
    twin.evict(1)  # top
    twin = grown(student, ("x", None, 1))
    twin.lock("x")
    twin.unlock("x")
    twin.evict(1)
    twin.add("d", None, 1)
    twin.add("x", None, 1)
    twin.evict(1)  # d
    twin = grown(student, ("upper", None, 1))
    twin.evict(1)
    twin.add("d", None, 1)
    twin.add("lower", None, 2)
    twin.split("lower", "upper", 1)
    twin.lock("d")
    twin.evict(1)  # lower
    twin.unlock("d")
    twin.evict(1)  # d: upper was last used when lower was, whoever had the name
    kinds = ["add", "add", "add", "split", "use", "lock", "unlock", "evict"]
    for _ in range(40):
        random_life(student, chance, 30, kinds)


def test_long_random_lives(student, chance):
    kinds = ["add", "add", "add", "split", "use", "use", "lock", "unlock", "evict"]
    for _ in range(5):
        random_life(student, chance, 250, kinds)
