"""Takes a node that is locked for one that is used."""

SAYS = "to go, got"


def make_evictor():
    from radix_evict import Evictor

    class Wrong(Evictor):
        def lock(self, node):
            super().lock(node)
            self.use(node)

    return Wrong()
