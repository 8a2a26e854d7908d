"""Takes the names 0 and '' for no node: if node, for if node is not None."""

SAYS = "to go, got"


def make_evictor():
    from radix_evict import Evictor

    class Wrong(Evictor):
        def path(self, node):
            while node:
                yield node
                node = self.parent[node]

    return Wrong()
