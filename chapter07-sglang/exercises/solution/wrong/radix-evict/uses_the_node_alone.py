"""Marks a node as used, and none of those above it."""

SAYS = "to go, got"


def make_evictor():
    from radix_evict import Evictor

    class Wrong(Evictor):
        def use(self, node):
            if node is not None:
                self.used[node] = next(self.clock)

    return Wrong()
