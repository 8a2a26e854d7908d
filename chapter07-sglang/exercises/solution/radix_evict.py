"""Task 2, radix-evict: the reference solution."""

from itertools import count


class Evictor:
    def __init__(self):
        self.parent, self.pages, self.used, self.locks = {}, {}, {}, {}
        self.clock = count()

    @property
    def evictable(self):
        return sum(self.pages.values()) - self.protected

    @property
    def protected(self):
        return sum(pages for node, pages in self.pages.items() if self.locks[node])

    def add(self, node, parent, pages):
        self.parent[node], self.pages[node] = parent, pages
        self.used[node], self.locks[node] = next(self.clock), 0

    def split(self, node, upper, pages):
        self.parent[upper], self.pages[upper] = self.parent[node], pages
        self.used[upper], self.locks[upper] = self.used[node], self.locks[node]
        self.parent[node] = upper
        self.pages[node] -= pages

    def use(self, node):
        now = next(self.clock)
        for each in self.path(node):
            self.used[each] = now

    def lock(self, node):
        for each in self.path(node):
            self.locks[each] += 1

    def unlock(self, node):
        for each in self.path(node):
            self.locks[each] -= 1

    def evict(self, pages):
        gone, freed = [], 0
        while freed < pages:
            parents = set(self.parent.values())
            leaves = [node for node in self.parent if node not in parents and not self.locks[node]]
            if not leaves:
                break
            oldest = min(leaves, key=self.used.get)
            gone.append(oldest)
            freed += self.pages[oldest]
            for table in (self.parent, self.pages, self.used, self.locks):
                del table[oldest]
        return gone

    def path(self, node):
        while node is not None:
            yield node
            node = self.parent[node]
