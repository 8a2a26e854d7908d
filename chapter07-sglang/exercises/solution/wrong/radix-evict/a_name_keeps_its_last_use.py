"""Takes a node for as old as an earlier one of its name: setdefault, and nothing is forgotten."""

SAYS = "to go, got"


def make_evictor():
    from radix_evict import Evictor

    class Wrong(Evictor):
        def __init__(self):
            super().__init__()
            self.gone = {}

        def add(self, node, parent, pages):
            super().add(node, parent, pages)
            self.used[node] = self.gone.get(node, self.used[node])

        def evict(self, pages):
            before = dict(self.used)
            gone = super().evict(pages)
            self.gone |= {node: before[node] for node in gone}
            return gone

    return Wrong()
