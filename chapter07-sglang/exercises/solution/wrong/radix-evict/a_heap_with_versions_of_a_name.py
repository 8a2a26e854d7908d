"""Leaves old entries in a heap, by a version that begins anew with the name of a node."""

SAYS = "to go, got"


def make_evictor():
    from heapq import heappop, heappush
    from itertools import count

    from radix_evict import Evictor

    class Wrong(Evictor):
        def __init__(self):
            super().__init__()
            self.heap, self.version, self.turn = [], {}, count()

        def push(self, node):
            entry = self.used[node], next(self.turn), node, self.version[node]
            heappush(self.heap, entry)

        def add(self, node, parent, pages):
            super().add(node, parent, pages)
            self.version[node] = 0
            self.push(node)

        def split(self, node, upper, pages):
            super().split(node, upper, pages)
            self.version[upper] = 0

        def use(self, node):
            super().use(node)
            for each in self.path(node):
                self.version[each] += 1
                self.push(each)

        def unlock(self, node):
            super().unlock(node)
            for each in self.path(node):
                self.push(each)

        def evict(self, pages):
            gone, freed = [], 0
            while freed < pages and self.heap:
                _, _, node, version = heappop(self.heap)
                inner = node in self.parent.values()
                if node not in self.parent or version != self.version[node] or inner:
                    continue
                if self.locks[node]:
                    continue
                gone.append(node)
                freed += self.pages[node]
                parent = self.parent[node]
                for table in (self.parent, self.pages, self.used, self.locks):
                    del table[node]
                if parent is not None:
                    self.push(parent)
            return gone

    return Wrong()
