"""The radix tree against a list of the sequences that it was given, after any operations."""

from hypothesis import given, settings
from hypothesis import strategies as st

from radix.traces import chat, few_shot, tree_of_thoughts
from radix.tree import RadixTree

tokens = st.lists(st.integers(0, 2), min_size=1, max_size=12)
actions = st.one_of(
    st.tuples(st.sampled_from(["match", "insert", "lock"]), tokens),
    st.tuples(st.sampled_from(["unlock", "evict"]), st.integers(1, 12)),
)


class Plain:
    """What the tree means: each cached prefix in whole pages, with its last page's value."""

    def __init__(self, page):
        self.page, self.values = page, {}

    def prefixes(self, sequence):
        return [tuple(sequence[:end]) for end in range(self.page, len(sequence) + 1, self.page)]

    def match(self, sequence):
        found = []
        for prefix in self.prefixes(sequence):
            if prefix not in self.values:
                break
            found.append(self.values[prefix])
        return found

    def insert(self, sequence, values):
        for prefix, value in zip(self.prefixes(sequence), values, strict=False):
            self.values.setdefault(prefix, value)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(page=st.sampled_from([1, 2, 3]), todo=st.lists(actions, max_size=40))
def test_it_knows_what_was_inserted_and_gives_up_only_what_nobody_uses(page, todo):
    tree, plain = RadixTree(page), Plain(page)
    locked = []
    for step, (action, given_) in enumerate(todo):
        if action == "insert":
            values = [100 * step + place for place in range(len(given_))]
            found, node = tree.insert(given_, values)
            assert found == plain.match(given_)
            plain.insert(given_, values)
            assert whole(node) == plain.match(given_)
        elif action in ("match", "lock"):
            found, node = tree.match(given_)
            assert found == plain.match(given_) == whole(node)
            if action == "lock":
                tree.lock(node)
                locked.append((node, found))
        elif action == "unlock" and locked:
            tree.unlock(locked.pop(given_ % len(locked))[0])
        elif action == "evict":
            could = tree.evictable
            freed = tree.evict(given_)
            assert len(freed) >= min(given_, could)
            assert not set(freed) & {value for _, found in locked for value in found}
            plain.values = {p: v for p, v in plain.values.items() if v not in freed}
        check(tree, plain, locked)


def check(tree, plain, locked):
    nodes = list(tree.nodes())
    held = [value for node in nodes for value in node.values]
    assert sorted(held) == sorted(plain.values.values())
    assert tree.evictable + tree.protected == len(held)
    assert tree.protected == sum(len(node.values) for node in nodes if node.locks)
    in_use = {value for _, found in locked for value in found}
    assert in_use == {value for node in nodes if node.locks for value in node.values}
    for node in nodes:
        assert len(node.tokens) == len(node.values) * tree.page_size > 0
        assert node.parent.children[node.tokens[: tree.page_size]] is node


def whole(node):
    return [value for each in reversed(list(node.path())) for value in each.values]


def test_the_leaf_longest_unused_goes_first_and_a_prefix_after_what_follows_it():
    tree = RadixTree()
    tree.insert([1, 2, 3, 4], [70, 71, 72, 73])
    tree.insert([1, 2, 5], [90, 91, 75])  # its own 90 and 91 are not stored
    tree.match([1, 2, 3, 4])
    assert tree.evict(1) == [75]
    assert tree.evict(1) == [72, 73]  # a whole leaf
    assert tree.evict(1) == [70, 71]
    assert tree.evict(1) == []


def test_a_trace_repeats_what_its_formula_says():
    """Counted by comparing each prompt with all that came before it, without any tree."""
    for trace in (few_shot(5, 9, 4, 3), chat(3, 3, 7, 5, 4), tree_of_thoughts(2, 8, 2, 3, 5)):
        before, found = [], 0
        for prompt, answer in trace.pairs:
            found += max((common(prompt[:-1], other) for other in before), default=0)
            before.append([*prompt, *answer[:-1]])
        assert found == trace.hits(1), trace.name


def common(one, other):
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count
