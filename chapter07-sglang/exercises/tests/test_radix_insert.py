"""Task 1: sequences by hand, then random lives beside a dictionary of all prefixes."""

from grader_trees import asked_and_seen, cut_at_every_token
from token_kinds import token_kinds

PAGES = (1, 2, 3, 4, 5, 16)
DEEP = 3000


class Twin:
    """A student's tree, and beside it every cached prefix with its value, and where nodes end."""

    def __init__(self, student, page_size, look=True):
        """`look`: whether the paths are judged, too, and not the values alone."""
        self.tree, self.size, self.look = student.make_radix_tree(page_size), page_size, look
        self.values, self.ends, self.history = {}, set(), []

    def __str__(self):
        told = ", ".join(self.history[-6:])
        dots = "… " if len(self.history) > 6 else ""
        return f"pages of {self.size}, after {dots}{told}"

    def prefixes(self, tokens):
        return [tuple(tokens[: n * self.size]) for n in range(1, len(tokens) // self.size + 1)]

    def known(self, tokens):
        found = [prefix for prefix in self.prefixes(tokens) if prefix in self.values]
        self.ends.update(found[-1:])
        return found

    def match(self, tokens):
        expected = [self.values[prefix] for prefix in self.known(tokens)]
        got = list(self.ask("match", tokens))
        assert got == expected, f"expected the values {expected}, got {got}: {self}"

    def insert(self, tokens, values):
        known, prefixes = self.known(tokens), self.prefixes(tokens)
        for prefix, value in zip(prefixes, values, strict=False):
            self.values.setdefault(prefix, value)
        self.ends.update(prefixes[-1:])
        got = self.ask("insert", tokens, values)
        assert got == len(known) and type(got) is int, (
            f"expected {len(known)} pages to be cached before, got {got}: {self}"
        )

    def ask(self, method, *arguments):
        self.history.append(f"{method}({', '.join(map(str, arguments))})")
        handed = [argument[:] for argument in arguments]
        answer, paths = asked_and_seen(self.tree, method, *handed)
        assert handed == list(arguments), f"{self}: the arguments were changed"
        got = sorted([list(run) for run in path] for path in paths)
        if self.look:
            expected = self.expected_paths()
            missing = [path for path in expected if path not in got]
            extra = [path for path in got if path not in expected]
            assert got == expected, (
                f"expected {len(expected)} paths, got {len(got)}; the first that is missing, and "
                f"the first too many: {missing[:1]}, {extra[:1]}: {self}"
            )
        for given in (given for given in handed if isinstance(given, list)):
            given[:] = [-9] * (len(given) + 1)  # what is the caller's to change changes no tree
        if not isinstance(answer, list):
            return answer
        kept = list(answer)
        answer[:] = [-9] * (len(answer) + 1)
        return kept

    def expected_paths(self):
        paths = []
        for leaf in self.ends:
            if any(len(other) > len(leaf) and other[: len(leaf)] == leaf for other in self.ends):
                continue
            stops = [n for n in range(1, len(leaf) + 1) if leaf[:n] in self.ends]
            begins = [0, *stops[:-1]]
            paths.append([list(leaf[a:b]) for a, b in zip(begins, stops, strict=True)])
        return sorted(paths)


def random_life(twin, chance, steps, whole=True):
    """Sequences of few kinds of tokens, mostly beginnings of earlier ones that go on otherwise."""
    seen, value = [[]], 2**24
    kinds = token_kinds(chance)[:2]
    for _ in range(steps):
        before = seen[chance.integers(len(seen))]
        kept = int(chance.integers(len(before) + 1))
        pages = int(chance.integers(5)) * twin.size
        more = pages + (0 if whole else int(chance.integers(twin.size)))
        tokens = before[:kept] + chance.choice(kinds, more).tolist()
        if whole:
            tokens = tokens[: len(tokens) // twin.size * twin.size]
        if chance.random() < 0.5:
            twin.match(tokens)
        else:
            count = len(tokens) // twin.size
            spare = 0 if whole else int(chance.integers(3))
            twin.insert(tokens, list(range(value, value + count + spare)))
            value += count + spare
            seen.append(tokens)


def test_the_longest_cached_prefix(student, chance):
    twin = Twin(student, 1, look=False)
    twin.match([1, 2])
    twin.match([])
    twin.insert([1, 2, 3, 4], [70, 71, 0, 70_000])  # a value may be 0
    for tokens in ([1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2], [1, 2, 9], [2, 3], [1, 2, 3], []):
        twin.match(tokens)
    twin.insert([1, 2, 8, 9], [80, 81, 82, 83])  # 1 and 2 keep 70 and 71
    twin.insert([1, 2, 8], [90, 91, 92])
    twin.insert([5], [95])
    twin.insert([1, 2, 3, 4, 5, 6], [60, 61, 62, 63, 64, 65])
    for tokens in ([1, 2, 8, 9], [1, 2, 3, 4, 5, 6, 7], [5, 1], [1, 2, 8, 3], [0]):
        twin.match(tokens)
    twin.insert((1, 2, 8, 7), (50, 51, 52, 53))  # any sequences
    twin.match((1, 2, 8, 7))
    twin.insert([150_000, 2, 150_000 - 2**16], [10, 11, 12])
    twin.match([int(text) for text in ("150000", "2", "150000")])  # equal, and no same objects
    for _ in range(12):
        random_life(Twin(student, 1, look=False), chance, 30)


def test_a_node_is_split_where_sequences_part(student, chance):
    twin = Twin(student, 1)
    twin.match([1])
    twin.insert([1, 2, 3, 4], [0, 1, 2, 3])
    twin.insert([1, 2, 5], [4, 5, 6])  # [1, 2] with two children
    twin.match([1, 2, 3])  # splits [3, 4]
    twin.match([1, 2, 5, 6])  # ends with a node: splits none
    twin.insert([1], [7])  # nothing is new, and yet [1, 2] is split
    twin.insert([], [])
    twin.insert([1, 2, 3, 4, 8, 9], list(range(6)))  # goes on below a leaf
    twin.match([7, 1])
    for _ in range(12):
        random_life(Twin(student, 1), chance, 30)


def test_whole_pages_only(student, chance):
    twin = Twin(student, 4)
    twin.insert([1, 2, 3], [])
    twin.insert([1, 2, 3, 4, 5, 6, 7, 8, 9], [70, 71])
    twin.match([1, 2, 3, 4, 5, 6, 7, 0])  # the second page differs in its last token
    twin.insert([1, 2, 3, 0, 5, 6, 7, 8], [80, 81])  # two nodes that begin with 1, 2, 3
    twin.match([1, 2, 3, 0, 5, 6, 7])
    twin.match([1, 2, 3, 9])
    twin.insert([1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9], [90, 91, 92, 93, 94])  # 93, 94: not used
    twin.match([1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9, 1, 2, 3, 4])
    twin.match([1, 2, 3])
    twin = Twin(student, 2)
    alike = [1, 11, 70_000, 5], [11, 1, 70_000, 5], [1, 11, 70_000 - 2**16, 5]
    for number, tokens in enumerate(alike):
        twin.insert(tokens, [10 * number, 10 * number + 1])
    for tokens in alike:
        twin.match(tokens)
    for number in range(24):
        random_life(Twin(student, PAGES[number % len(PAGES)]), chance, 20, whole=False)


def test_long_random_lives(student, chance):
    for size in (1, int(chance.choice(PAGES))):
        random_life(Twin(student, size), chance, 120, whole=False)
    known, values, paths = cut_at_every_token(student.make_radix_tree(1), DEEP)
    case = f"{DEEP} tokens, 0, 1, …, matched at each length, then inserted with one more"
    assert known == DEEP, f"{case}: expected {DEEP} pages to be cached before, got {known}"
    assert list(values) == list(range(DEEP + 1)), f"{case}: got {len(values)} values"
    [path] = paths
    assert [list(run) for run in path] == [[token] for token in range(DEEP + 1)], (
        f"{case}: expected a path of {DEEP + 1} nodes of one token, got {len(path)} nodes"
    )
