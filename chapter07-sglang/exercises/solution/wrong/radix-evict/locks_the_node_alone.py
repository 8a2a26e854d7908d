"""Locks a node, and none of those above it."""

SAYS = "pages evictable"


def make_evictor():
    from radix_evict import Evictor

    class Wrong(Evictor):
        def lock(self, node):
            if node is not None:
                self.locks[node] += 1

        def unlock(self, node):
            if node is not None:
                self.locks[node] -= 1

    return Wrong()
