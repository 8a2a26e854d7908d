"""Knows that a node is locked, and not how often."""

SAYS = "pages evictable"


def make_evictor():
    from radix_evict import Evictor

    class Wrong(Evictor):
        def lock(self, node):
            for each in self.path(node):
                self.locks[each] = 1

        def unlock(self, node):
            for each in self.path(node):
                self.locks[each] = 0

    return Wrong()
