"""Task 1, radix-insert: the reference solution."""

from itertools import chain


class Node:
    def __init__(self, pages, values):
        self.pages, self.values = pages, values
        self.children = {}  # by their first page


class RadixTree:
    def __init__(self, page_size):
        self.page_size = page_size
        self.root = Node([], [])

    def match(self, tokens):
        return self.walk(self.whole_pages(tokens))[0]

    def insert(self, tokens, values):
        pages = self.whole_pages(tokens)
        found, node = self.walk(pages)
        known = len(found)
        if known < len(pages):
            node.children[pages[known]] = Node(pages[known:], values[known : len(pages)])
        return known

    def paths(self):
        paths, waiting = [], [(self.root, [])]
        while waiting:
            node, path = waiting.pop()
            for child in node.children.values():
                waiting.append((child, [*path, list(chain(*child.pages))]))
            if path and not node.children:
                paths.append(path)
        return paths

    def whole_pages(self, tokens):
        stops = range(self.page_size, len(tokens) + 1, self.page_size)
        return [tuple(tokens[stop - self.page_size : stop]) for stop in stops]

    def walk(self, pages):
        """(values of the cached prefix, the node that ends with it)."""
        node, values = self.root, []
        while len(values) < len(pages) and pages[len(values)] in node.children:
            node = node.children[pages[len(values)]]
            common = 0
            for own, wanted in zip(node.pages, pages[len(values) :], strict=False):
                if own != wanted:
                    break
                common += 1
            if common < len(node.pages):
                split(node, common)  # no child begins as the pages go on
            values += node.values
        return values, node


def split(node, at):
    """Leave the first pages of a node in it, and put the rest, with its children, below."""
    rest = Node(node.pages[at:], node.values[at:])
    rest.children = node.children
    node.pages, node.values = node.pages[:at], node.values[:at]
    node.children = {rest.pages[0]: rest}
