"""Takes the nodes above a new one for used."""

SAYS = "to go, got"


def make_evictor():
    from radix_evict import Evictor

    class Wrong(Evictor):
        def add(self, node, parent, pages):
            super().add(node, parent, pages)
            self.use(node)

    return Wrong()
